"""Hugging Face: tiny configurations of many architectures, built without a download, called with keyword inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .network import Network

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0}
SPEECH = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
BOTH = {
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 100,
    "use_cache": False,
}
# model type -> (class, configuration); called with input_ids and attention_mask
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", TEXT),
    "roberta": ("RobertaModel", TEXT),
    "electra": ("ElectraModel", {**TEXT, "embedding_size": 32}),
    "albert": ("AlbertModel", {**TEXT, "embedding_size": 32}),
    "mpnet": ("MPNetModel", TEXT),
    "deberta-v2": ("DebertaV2Model", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": ("DistilBertModel", {"dim": 64, "hidden_dim": 128, "n_layers": 4, "n_heads": 4, "vocab_size": 100}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", TEXT),
    "camembert": ("CamembertForTokenClassification", TEXT),
    "squeezebert": ("SqueezeBertModel", {**TEXT, "embedding_size": 64}),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 100, "use_cache": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TEXT, "use_cache": False}),
    "llama": ("LlamaForCausalLM", CAUSAL),
    "mistral": ("MistralForCausalLM", CAUSAL),
    "qwen2": ("Qwen2ForCausalLM", CAUSAL),
    "gemma": ("GemmaForCausalLM", {**CAUSAL, "head_dim": 16}),
    "phi": ("PhiForCausalLM", CAUSAL),
    "opt": ("OPTForCausalLM", {**CAUSAL, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 100, "use_cache": False},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 4, "state_size": 8, "vocab_size": 100, "use_cache": False},
    ),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", VISION),
    "deit": ("DeiTModel", VISION),
    "beit": ("BeitModel", VISION),
    "dinov2": ("Dinov2Model", {**VISION, "mlp_ratio": 2}),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": ("ConvNextModel", {"hidden_sizes": [16, 32, 64], "depths": [2, 2, 2], "num_stages": 3}),
    "resnet": ("ResNetModel", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}),
    "regnet": ("RegNetModel", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16}),
    "mobilevit": (
        "MobileViTModel",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
    ),
    "segformer": ("SegformerForSemanticSegmentation", {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 32}),
    "poolformer": ("PoolFormerModel", {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]}),
}
SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2ForCTC", {**SPEECH, "vocab_size": 32}),
    "hubert": ("HubertModel", SPEECH),
    "wavlm": ("WavLMModel", SPEECH),
    "data2vec-audio": ("Data2VecAudioModel", SPEECH),
    "unispeech-sat": ("UniSpeechSatModel", SPEECH),
    "sew": ("SEWModel", {**SPEECH, "squeeze_factor": 2}),
}
CODEC = {"sampling_rate": 16000, "hidden_size": 32, "num_filters": 16, "codebook_size": 32, "codebook_dim": 32}


def networks() -> list[Network]:
    found = []
    for table, inputs in ((ENCODERS, _tokens), (DECODERS, _tokens), (IMAGES, _image), (SOUND, _sound)):
        for kind, (name, options) in table.items():
            size = options.get("image_size", 64)
            inputs_of: Callable[[int], dict[str, Any]] = partial(_image, size=size) if inputs is _image else inputs
            found.append(_network(kind, partial(_model, kind, name, **options), inputs_of))
    return [*found, *_encoder_decoders(), *_codecs()]


def _network(
    name: str, make: Callable[[], nn.Module], kwargs: Callable[[int], dict[str, Any]], scope: str | None = None
) -> Network:
    return Network(f"hf_{name}", "hugging_face", make, kwargs=kwargs, scope=scope)


def _model(kind: str, name: str, **options: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    return getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **options))


def _tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 100, (batch, 12)), "attention_mask": torch.ones(batch, 12, dtype=torch.long)}


def _image(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 2000)}


def _encoder_decoders() -> list[Network]:
    t5 = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "vocab_size": 100,
        "use_cache": False,
    }
    whisper = {
        **BOTH,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    }
    speech = {
        **BOTH,
        "max_source_positions": 100,
        "conv_channels": 64,
        "input_feat_per_channel": 16,
        "max_target_positions": 20,
    }
    tower = {**TEXT, "max_position_embeddings": 16, "projection_dim": 32}
    pair = {
        "text_config": {**tower, "eos_token_id": 99},
        "vision_config": {**VISION, "projection_dim": 32},
        "projection_dim": 32,
    }
    return [
        _network("t5", partial(_model, "t5", "T5ForConditionalGeneration", **t5), _translation),
        _network("t5_encoder", partial(_model, "t5", "T5EncoderModel", **t5), _tokens),
        _network("bart", partial(_model, "bart", "BartModel", **BOTH), _translation),
        _network("pegasus", partial(_model, "pegasus", "PegasusModel", **BOTH), _translation),
        _network(
            "whisper", partial(_model, "whisper", "WhisperForConditionalGeneration", **whisper), _transcription(16, 40)
        ),
        _network(
            "whisper_encoder",
            lambda: _model("whisper", "WhisperModel", **whisper).get_encoder(),
            lambda batch: {"input_features": torch.randn(batch, 16, 40)},
        ),
        _network(
            "speech_to_text", partial(_model, "speech_to_text", "Speech2TextModel", **speech), _transcription(40, 16)
        ),
        _network("clip", partial(_model, "clip", "CLIPModel", **pair), _pair),
        _network("siglip", partial(_model, "siglip", "SiglipModel", text_config=tower, vision_config=VISION), _pair),
        _network(
            "audio_spectrogram_transformer",
            partial(
                _model,
                "audio-spectrogram-transformer",
                "ASTForAudioClassification",
                **TEXT
                | {"max_length": 40, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 4, "time_stride": 4},
            ),
            lambda batch: {"input_values": torch.randn(batch, 40, 16)},
        ),
    ]


def _translation(batch: int) -> dict[str, Tensor]:
    return {**_tokens(batch), "decoder_input_ids": torch.randint(5, 100, (batch, 7))}


def _transcription(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {
        "input_features": torch.randn(batch, *shape),
        "decoder_input_ids": torch.randint(5, 100, (batch, 7)),
    }


def _pair(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 99, (batch, 12)), **_image(batch, 32)}


def _codecs() -> list[Network]:
    """Encoders and decoders as networks of their own, and the whole codec with the encoder as scope."""
    dac = {
        "encoder_hidden_size": 16,
        "downsampling_ratios": [2, 4],
        "decoder_hidden_size": 64,
        "n_codebooks": 2,
        "codebook_size": 32,
        "codebook_dim": 8,
    }
    mimi = {
        **CODEC,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 64,
        "num_quantizers": 4,
        "upsample_groups": 32,
        "vector_quantization_hidden_dimension": 32,
        "use_cache": False,
    }
    codecs = {
        "encodec": partial(_model, "encodec", "EncodecModel", **CODEC, upsampling_ratios=[4, 2], chunk_length_s=None),
        "dac": partial(_model, "dac", "DacModel", **dac),
        "mimi": partial(_model, "mimi", "MimiModel", **mimi),
    }
    width = {"encodec": 32, "dac": 64, "mimi": 32}
    found = []
    for name, make in codecs.items():

        def values(batch: int) -> dict[str, Tensor]:
            return {"input_values": torch.randn(batch, 1, 1920)}

        found.append(_network(name, make, values))
        found.append(_network(f"{name}_scope", make, values, scope="encoder"))
        for part, shape in (("encoder", (1, 1920)), ("decoder", (width[name], 24))):
            found.append(
                Network(
                    f"hf_{name}_{part}",
                    "hugging_face",
                    lambda make=make, part=part: getattr(make(), part),  # type: ignore[misc]
                    lambda batch, shape=shape: (torch.randn(batch, *shape),),  # type: ignore[misc]
                )
            )
    return found
