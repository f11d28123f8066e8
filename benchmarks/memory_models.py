"""How long does a prediction take for networks that others wrote, and does it succeed?

    python benchmarks/memory_models.py [NAME …]

A training step each, with AdamW, of networks without weights: separators, and what transformers
has. Nothing here was read on a GPU: the benchmark shows that ordinary code is predicted, and when.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
from record import record, table
from torch import Tensor, nn

from tfswa_lab.memory.predict import predict
from tfswa_lab.memory.sizes import format_bytes


def training(make_model: Callable, make_batch: Callable, loss_of: Callable) -> Callable:
    """A training step on a GPU, its batches made on the host."""

    def make_step() -> Callable:
        model = make_model().cuda().train()
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> float:
            batch = {name: tensor.cuda(non_blocking=True) for name, tensor in make_batch().items()}
            loss = loss_of(model(**batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    return make_step


SOURCES = ["drums", "bass", "other", "vocals"]
FOUR_SECONDS = 4 * 44_100


def htdemucs() -> nn.Module:
    """Hybrid Transformer Demucs, of the package demucs."""
    from demucs.htdemucs import HTDemucs

    return HTDemucs(SOURCES)


def hdemucs() -> nn.Module:
    """Hybrid Demucs, of torchaudio."""
    from torchaudio.models import hdemucs_high

    return hdemucs_high(SOURCES)


def conformer() -> nn.Module:
    """Of torchaudio."""
    from torchaudio.models import Conformer

    return Conformer(
        input_dim=80, num_heads=4, ffn_dim=256, num_layers=8, depthwise_conv_kernel_size=31
    )


def open_unmix() -> nn.Module:
    """Of the package openunmix."""
    from openunmix.model import OpenUnmix

    return OpenUnmix(nb_bins=2049, nb_channels=2)


def transformer(model: str, config: str, half: bool = False, **sizes: int) -> Callable:
    """A model of transformers with the sizes of its configuration, or with others."""

    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return made.to(torch.bfloat16) if half else made

    return make


def tokens(vocabulary: int, batch: int = 4, length: int = 512) -> Callable:
    """A batch of a language model."""

    def make() -> dict[str, Tensor]:
        drawn = torch.randint(0, vocabulary, (batch, length))
        return {"input_ids": drawn, "labels": drawn.clone()}

    return make


def images(batch: int = 16) -> dict[str, Tensor]:
    """A batch of a classifier."""
    return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(2, (batch,))}


def sound(name: str, *shape: int) -> Callable:
    """A batch of waveforms or spectrograms."""
    return lambda: {name: torch.randn(shape)}


def frames() -> dict[str, Tensor]:
    """A batch of a recogniser, with lengths that the program knows."""
    return {"input": torch.randn(4, 400, 80), "lengths": torch.tensor([400, 350, 200, 90])}


def speech() -> dict[str, Tensor]:
    """Two recordings of ten seconds and their transcripts."""
    return {"input_values": torch.randn(2, 160_000), "labels": torch.randint(1, 31, (2, 40))}


def squared(found: Tensor | tuple) -> Tensor:
    """A loss of a network that returns an estimate."""
    return (found[0] if isinstance(found, tuple) else found).square().mean()


def own_loss(found: object) -> Tensor:
    """The loss that the models of transformers return."""
    return found.loss


VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 4}
MODELS = {
    "HTDemucs": training(htdemucs, sound("mix", 1, 2, FOUR_SECONDS), squared),
    "HDemucs": training(hdemucs, sound("input", 1, 2, FOUR_SECONDS), squared),
    "Conformer": training(conformer, frames, squared),
    "Open-Unmix": training(open_unmix, sound("x", 4, 2, 2049, 255), squared),
    "ResNet-50": training(
        transformer("ResNetForImageClassification", "ResNetConfig"), images, own_loss
    ),
    "ViT-L/16": training(
        transformer("ViTForImageClassification", "ViTConfig", intermediate_size=4096, **VIT_L),
        images,
        own_loss,
    ),
    "ConvNeXt-T": training(
        transformer("ConvNextForImageClassification", "ConvNextConfig"), images, own_loss
    ),
    "GPT-2": training(transformer("GPT2LMHeadModel", "GPT2Config"), tokens(50_257), own_loss),
    "BERT": training(transformer("BertForMaskedLM", "BertConfig"), tokens(30_522), own_loss),
    "Llama, grouped heads, bf16": training(
        transformer("LlamaForCausalLM", "LlamaConfig", half=True, **LLAMA), tokens(32_000), own_loss
    ),
    "Whisper": training(
        transformer("WhisperForConditionalGeneration", "WhisperConfig"),
        lambda: sound("input_features", 2, 80, 3000)() | {"labels": torch.randint(9, (2, 64))},
        own_loss,
    ),
    "wav2vec 2.0": training(transformer("Wav2Vec2ForCTC", "Wav2Vec2Config"), speech, own_loss),
}
FOR_ALL = ("temporaries", "the CUDA context", "cuDNN", "cuFFT")  # sentences of every budget


def row_of(name: str) -> dict:
    """The prediction for a network."""
    with warnings.catch_warnings(action="ignore"):
        found = predict(MODELS[name])
    return {
        "network": name,
        "peak": found.peak,
        "workspaces": found.workspaces,
        "reserved": found.reserved,
        "host": found.host.allocated,
        "seconds": round(found.seconds, 2),
        "notes": [sentence for sentence in found.budget if not sentence.startswith(FOR_ALL)],
    }


def main() -> None:
    """Predict, record, print."""
    chosen = sys.argv[1:] or MODELS
    rows = []
    for name in chosen:
        rows.append(row_of(name))
        print(rows[-1], flush=True)
    sizes = ("peak", "reserved", "host")
    lines = [
        [row["network"], *(format_bytes(row[size]) for size in sizes), row["seconds"]]
        for row in rows
    ]
    print(table(["network", "GPU, peak", "reserved", "host", "seconds"], lines))
    if not sys.argv[1:]:
        record("memory_models", "cpu", {"rows": rows})


if __name__ == "__main__":
    main()
