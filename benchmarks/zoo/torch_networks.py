"""torchvision (classification, segmentation, video) and torchaudio, small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .network import Network, noise

CLASSIFICATION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_16",
)
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
FIXED = {"maxvit_t": 224, "vit_b_16": 224, "inception_v3": 299}
SLOW_TO_INITIALISE = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def torchvision_networks() -> list[Network]:
    found = []
    for name in CLASSIFICATION:
        size = FIXED.get(name, 128)
        make = _torchvision(name, **SLOW_TO_INITIALISE.get(name, {}))
        found.append(Network(f"torchvision_{name}", "torchvision", make, noise(3, size, size)))
    for name in SEGMENTATION:
        make = _torchvision(name, weights_backbone=None)
        found.append(Network(f"torchvision_{name}", "torchvision", make, noise(3, 96, 96)))
    for name in VIDEO:
        frames, size = (16, 224) if name == "s3d" else (8, 64)
        found.append(Network(f"torchvision_{name}", "torchvision", _torchvision(name), noise(3, frames, size, size)))
    found.append(Network("torchvision_mvit", "torchvision", _mvit, noise(3, 8, 64, 64)))
    return found


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return make


def _mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(i: int, o: int, heads: int, query: list[int], key: list[int]) -> MSBlockConfig:
        return MSBlockConfig(
            num_heads=heads,
            input_channels=i,
            output_channels=o,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=query,
            stride_kv=key,
        )

    setting = [
        block(48, 96, 1, [1, 1, 1], [1, 4, 4]),
        block(96, 96, 2, [1, 2, 2], [1, 2, 2]),
        block(96, 192, 2, [1, 1, 1], [1, 2, 2]),
        block(192, 192, 4, [1, 2, 2], [1, 1, 1]),
    ]
    return MViT(
        (64, 64),
        8,
        setting,
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
    )


def torchaudio_networks() -> list[Network]:
    group = "torchaudio"
    speech, wave = noise(4000), noise(1, 8000)
    return [
        Network("torchaudio_wav2vec2_group_norm", group, lambda: _wav2vec2("group_norm"), speech),
        Network("torchaudio_wav2vec2_layer_norm", group, lambda: _wav2vec2("layer_norm"), speech),
        Network(
            "torchaudio_wav2vec2_lengths",
            group,
            lambda: _wav2vec2("layer_norm"),
            lambda batch: (torch.randn(batch, 4000), torch.full((batch,), 4000)),
        ),
        Network("torchaudio_hubert", group, lambda: _wav2vec2("layer_norm", encoder_layer_norm_first=True), speech),
        Network("torchaudio_wavlm", group, _wavlm, speech),
        Network("torchaudio_conformer", group, _conformer, _lengths(40, 24)),
        Network("torchaudio_emformer", group, _emformer, _lengths(36, 24, less=4)),
        Network("torchaudio_conv_tasnet", group, _conv_tasnet, wave),
        Network("torchaudio_hdemucs", group, _hdemucs, noise(2, 16384)),
        Network(
            "torchaudio_deepspeech", group, lambda: _model("DeepSpeech", n_feature=26, n_hidden=128), noise(1, 40, 26)
        ),
        Network("torchaudio_wav2letter", group, lambda: _model("Wav2Letter", num_features=1), wave),
        Network(
            "torchaudio_wavernn",
            group,
            _wavernn,
            lambda batch: (torch.randn(batch, 1, 960), torch.randn(batch, 1, 24, 16)),
        ),
        Network("torchaudio_tacotron2", group, _tacotron2, _tacotron_inputs),
        Network(
            "torchaudio_tacotron2_encoder",
            group,
            lambda: _tacotron2().encoder,
            lambda batch: (torch.randn(batch, 64, 20), torch.full((batch,), 20)),
        ),
        Network("torchaudio_tacotron2_postnet", group, lambda: _tacotron2().postnet, noise(16, 30)),
        Network("torchaudio_squim_objective", group, _squim_objective, noise(8000)),
        Network(
            "torchaudio_squim_subjective",
            group,
            _squim_subjective,
            lambda batch: (torch.randn(batch, 8000), torch.randn(batch, 8000)),
        ),
    ]


def _model(name: str, **options: Any) -> nn.Module:
    import torchaudio

    return getattr(torchaudio.models, name)(**options)


def _lengths(time: int, features: int, less: int = 0) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, time, features), torch.full((batch,), time - less))


def _encoder_options() -> dict[str, Any]:
    return {
        "extractor_conv_layer_config": [(32, 10, 5), (32, 3, 4), (32, 2, 4)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 64,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 4,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 128,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
    }


def _wav2vec2(mode: str, **options: Any) -> nn.Module:
    return _model("wav2vec2_model", extractor_mode=mode, aux_num_out=29, **{**_encoder_options(), **options})


def _wavlm() -> nn.Module:
    options = _encoder_options()
    options.pop("encoder_pos_conv_kernel"), options.pop("encoder_pos_conv_groups")
    return _model(
        "wavlm_model",
        extractor_mode="group_norm",
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_buckets=32,
        encoder_max_distance=80,
        aux_num_out=None,
        **options,
    )


def _conformer() -> nn.Module:
    return _model("Conformer", input_dim=24, num_heads=4, ffn_dim=64, num_layers=4, depthwise_conv_kernel_size=7)


def _emformer() -> nn.Module:
    return _model(
        "Emformer", input_dim=24, num_heads=4, ffn_dim=64, num_layers=4, segment_length=8, right_context_length=4
    )


def _conv_tasnet() -> nn.Module:
    return _model(
        "ConvTasNet",
        num_sources=2,
        enc_kernel_size=16,
        enc_num_feats=64,
        msk_kernel_size=3,
        msk_num_feats=32,
        msk_num_hidden_feats=64,
        msk_num_layers=4,
        msk_num_stacks=2,
    )


def _hdemucs() -> nn.Module:
    return _model("HDemucs", sources=["speech", "rest"], channels=16, nfft=1024, depth=5)


def _wavernn() -> nn.Module:
    return _model(
        "WaveRNN",
        upsample_scales=[2, 4, 10],
        n_classes=64,
        hop_length=80,
        n_res_block=2,
        n_rnn=64,
        n_fc=64,
        n_freq=24,
        n_hidden=32,
        n_output=32,
    )


def _tacotron2() -> nn.Module:
    return _model(
        "Tacotron2",
        n_mels=16,
        symbol_embedding_dim=64,
        encoder_embedding_dim=64,
        encoder_n_convolution=2,
        attention_rnn_dim=64,
        attention_hidden_dim=32,
        decoder_rnn_dim=64,
        prenet_dim=32,
        postnet_embedding_dim=64,
    )


def _tacotron_inputs(batch: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(0, 100, (batch, 12))
    return tokens, torch.full((batch,), 12), torch.randn(batch, 16, 10), torch.full((batch,), 10)


def _squim_objective() -> nn.Module:
    from torchaudio.models import squim_objective_model

    return squim_objective_model(
        feat_dim=64, win_len=64, d_model=64, nhead=4, hidden_dim=64, num_blocks=2, rnn_type="LSTM", chunk_size=71
    )


def _squim_subjective() -> nn.Module:
    from torchaudio.models.squim.subjective import Predictor, SquimSubjective

    return SquimSubjective(
        _model("wav2vec2_model", extractor_mode="layer_norm", aux_num_out=None, **_encoder_options()),
        nn.Linear(64, 32),
        Predictor(64, 32),
    )
