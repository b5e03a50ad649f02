"""A lean SoundStream with a checkpoint, made to receive a Dynamic Switch Layer in its encoder."""

from recipes.soundstream.model import CUT, SoundStream, SoundStreamConfig, encoder_costs, pretrained

__all__ = ["CUT", "SoundStream", "SoundStreamConfig", "encoder_costs", "pretrained"]
