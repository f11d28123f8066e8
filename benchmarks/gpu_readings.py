"""How much memory do programs take on a GPU, as their authors have read it, and as predicted here?

    python benchmarks/gpu_readings.py             predict all, record, print a table
    python benchmarks/gpu_readings.py NAME …      only programs of these names, print each reading

`readings.json` has the readings with their sources. The programs below are written from the facts
there and in the sources: sizes, and the order of operations where it matters. No code was taken.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record, table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tfswa_lab.memory.predict import predict
from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.predict.cuda_kernels import cublas_workspaces

READINGS = Path(__file__).parent / "readings.json"
UNITS = {"GB": 10**9, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# --- CS336, the course's own model
SIZES = {  # width, feed-forward width, layers, heads
    "small": (768, 3072, 12, 12),
    "medium": (1024, 4096, 24, 16),
    "large": (1280, 5120, 36, 20),
    "xl": (1600, 6400, 48, 25),
    "2.7B": (2560, 10240, 32, 32),
}


class Matrix(nn.Module):
    """A linear layer without bias, applied with einsum."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Norm(nn.Module):
    """RMS norm in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * x).to(dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1, self.w3, self.w2 = (
            Matrix(width, hidden),
            Matrix(width, hidden),
            Matrix(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2((gate * torch.sigmoid(gate)) * self.w3(x))


def softmax(x: Tensor) -> Tensor:
    shifted = x - torch.max(x, dim=-1, keepdim=True)[0]
    powers = torch.exp(shifted)
    return powers / torch.sum(powers, dim=-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(k.shape[-1])
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    weights = softmax(scores)
    return torch.einsum("...qk,...kd->...qd", weights, v)


class Rotary(nn.Module):
    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, length, width // 2), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x1, x2 = x.unflatten(-1, (-1, 2)).movedim(-1, 0)
        cos, sin = self.cache[:, positions, :]
        y1 = cos * x1 - sin * x2
        y2 = sin * x1 + cos * x2
        return torch.cat((y1[..., None], y2[..., None]), -1).flatten(-2).contiguous()


class CourseAttention(nn.Module):
    def __init__(self, width: int, heads: int, rotary: Rotary):
        super().__init__()
        self.q, self.k, self.v, self.out = (Matrix(width, width) for _ in range(4))
        self.heads, self.rotary = heads, rotary

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        positions = torch.arange(length, device=x.device)[None, None]
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        order = torch.arange(length, device=x.device)
        mask = order[None, None, :, None] >= order[None, None, None, :]
        y = attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2).contiguous())


class CourseBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, rotary: Rotary):
        super().__init__()
        self.att, self.ffn = CourseAttention(width, heads, rotary), SwiGLU(width, hidden)
        self.n1, self.n2 = Norm(width), Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.att(self.n1(x))
        x1 = x + y
        z = self.ffn(self.n2(x1))
        return x1 + z


def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class CourseLM(nn.Module):
    def __init__(self, size: str, length: int, block: int = 0, vocabulary: int = 10_000):
        super().__init__()
        self.block = block  # layers in a checkpointed segment, 0 for none
        width, hidden, layers, heads = SIZES[size]
        self.token = nn.Parameter(torch.empty(vocabulary, width))
        rotary = Rotary(length, width // heads)
        self.layers = nn.ModuleList(
            CourseBlock(width, heads, hidden, rotary) for _ in range(layers)
        )
        self.norm, self.head = Norm(width), Matrix(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token[tokens, :]
        for start in range(0, len(self.layers), self.block or len(self.layers)):
            segment = self.layers[start : start + (self.block or len(self.layers))]
            x = checkpoint(run, segment, x, use_reentrant=False) if self.block else run(segment, x)
        return self.head(self.norm(x))


class CourseAdamW(torch.optim.Optimizer):
    """The course's AdamW: parameter by parameter, the moments are made anew in every step."""

    def __init__(self, parameters, lr: float = 1e-3):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state, lr = p.grad.data, self.state[p], group["lr"]
                old_m = state.get("m", torch.zeros_like(grad))
                old_v = state.get("v", torch.zeros_like(grad))
                m = 0.9 * old_m + (1 - 0.9) * grad
                v = 0.999 * old_v + (1 - 0.999) * torch.square(grad)
                p.data -= lr * m / (torch.sqrt(v) + 1e-8)
                p.data -= lr * 0.01 * p.data
                state["m"], state["v"] = m, v


def griceww(size: str, length: int, mode: str, bf16: bool, batch: int = 4):
    """Griceww/assignment2-systems, cs336_systems/benchmark.py: one warm-up step, one measured step.

    The stored script's "forward" is not that of the readings, which ran without gradients.
    """

    def make():
        model = CourseLM(size, length).cuda()
        optimizer = CourseAdamW(model.parameters())
        tokens = torch.randint(0, 10_000, (batch, length), device="cuda")
        cast = (lambda: torch.autocast("cuda", torch.bfloat16)) if bf16 else nullcontext

        def loss_of(logits):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        def train():
            optimizer.zero_grad(set_to_none=True)
            with cast():
                logits = model(tokens)
            with cast():
                loss = loss_of(logits)
            loss.backward()
            optimizer.step()

        def forward():
            with cast(), torch.inference_mode():
                logits = model(tokens)
            with cast():
                loss_of(logits)

        return train if mode == "train" else forward

    return make


OPTIMIZERS = {
    "course": CourseAdamW,
    "foreach": torch.optim.AdamW,
    "loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
}


def course_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    x = logits - torch.max(logits, dim=-1, keepdim=True)[0]
    log_softmax = x - torch.log(torch.sum(torch.exp(x), dim=-1, keepdim=True))
    negative = -log_softmax
    return torch.mean(torch.gather(negative, -1, targets.unsqueeze(-1)))


def checkpointing(length: int, block: int, optimizer: str, loss: str):
    """OpenMOSS/SummerQuest-2026, A2-K: medium, one row, autocast; segments of `block` layers.

    loss: "inside" autocast, or of `logits.float()` outside of it ("float").
    """

    def make():
        model = CourseLM("medium", length, block).cuda()
        update = OPTIMIZERS[optimizer](model.parameters())
        tokens, labels = (torch.randint(0, 10_000, (1, length), device="cuda") for _ in range(2))

        def step():
            update.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(tokens)
                if loss == "inside":
                    value = F.cross_entropy(logits.reshape(-1, 10_000), labels.reshape(-1))
            if loss == "float":
                value = F.cross_entropy(logits.float().reshape(-1, 10_000), labels.reshape(-1))
            value.backward()
            update.step()

        return step

    return make


def memory_run(
    size: str,
    length: int,
    mode: str,
    bf16: bool = False,
    batch: int = 1,
    loss: str = "torch",
    optimizer: str = "course",
    keep_logits: bool = True,
    inference: bool = False,
    forward_loss: bool = False,
    clip: bool = False,
):
    """damek's 2.7B, and OpenMOSS/SummerQuest-2026, A2-P: a forward pass, or a training step.

    loss: "course" or "torch" for the cross entropy, "float" for torch's of `logits.float()`;
    keep_logits: whether a name holds them until the step ends;
    inference: a forward pass in `inference_mode`, not `no_grad`;
    forward_loss: whether a forward pass includes the loss;
    """

    def make():
        model = CourseLM(size, length).cuda()
        update = OPTIMIZERS[optimizer](model.parameters()) if mode == "train" else None
        tokens, labels = (
            torch.randint(0, 10_000, (batch, length), device="cuda") for _ in range(2)
        )
        cast = (lambda: torch.autocast("cuda", torch.bfloat16)) if bf16 else nullcontext

        def loss_of(logits):
            if loss == "course":
                return course_cross_entropy(logits, labels)
            logits = logits.flatten(0, 1)
            return F.cross_entropy(logits.float() if loss == "float" else logits, labels.flatten())

        def forward():
            with torch.inference_mode() if inference else torch.no_grad(), cast():
                logits = model(tokens)
                if forward_loss:
                    loss_of(logits)

        def train():
            update.zero_grad(set_to_none=True)
            with cast():
                logits = model(tokens)
                value = loss_of(logits)
            if not keep_logits:
                del logits
            value.backward()
            if clip:
                clip_to_one([p.grad for p in model.parameters()])
            update.step()

        return train if mode == "train" else forward

    return make


def clip_to_one(grads: list[Tensor]) -> None:
    total = 0.0
    for grad in grads:
        total = total + (grad**2).sum()
    factor = torch.clamp(1 / (torch.sqrt(total) + 1e-6), max=1.0)
    for grad in grads:
        grad *= factor


# --- CS336, plain attention, 8 x length x width
def qkv(length: int, width: int, fill=torch.randn) -> list[Tensor]:
    return [fill(8, length, width, device="cuda", requires_grad=True) for _ in range(3)]


def damek_attention(width: int, length: int, until: str):
    """damek/cs336-assignment2-systems: read at the end, or at the peak, of the last step."""

    def make():
        inputs = qkv(length, width)
        kept = {}

        def train():
            out = attention(*inputs)
            loss = out.sum()
            loss.backward()
            for x in inputs:
                x.grad = None
            return kept

        def warm_up():
            kept["out"] = attention(*inputs)
            kept["loss"] = kept["out"].sum()
            kept["loss"].backward()
            for x in inputs:
                x.grad = None

        warm_up()
        if until == "inputs":
            return lambda: (inputs, kept)
        if until == "forward":

            def forward():
                attention(*inputs).sum()
                return kept

            return forward

        def before_backward():
            kept["out"] = attention(*inputs)
            kept["loss"] = kept["out"].sum()

        if until == "before backward":
            return before_backward
        before_backward()  # its graph lives on while the backward passes are timed
        return train

    return make


def markmrli_attention(width: int, length: int):
    """MarkMrLi/assignment2-systems: the peak of a forward pass while inputs and gradients exist."""

    def make():
        inputs, kept = qkv(length, width), {}

        def forward():
            kept["out"] = attention(*inputs)
            kept["out"] = kept["out"].sum()

        forward()
        kept["out"].backward()
        return forward

    return make


def yyin_attention(width: int, length: int):
    """yyin-dev/cs336-a2: after a masked forward pass; gradients and the graph exist."""

    def make():
        inputs, kept = qkv(length, width, torch.rand), {}
        mask = torch.tril(torch.ones((length, length), device="cuda")).bool()
        for _ in range(2):
            kept["out"] = attention(*inputs, mask)
            kept["loss"] = kept["out"].sum()
            kept["loss"].backward()

        def forward():
            kept["out"] = attention(*inputs, mask)

        return forward

    return make


def griceww_attention(width: int, length: int, until: str):
    """Griceww/assignment2-systems: before a backward pass, or the peak with it."""

    def make():
        order = torch.arange(length, device="cuda")
        mask, inputs, kept = order[:, None] >= order[None, :], qkv(length, width), {}

        def step():
            for x in inputs:
                x.grad = None
            kept["out"] = attention(*inputs, mask)
            kept["loss"] = kept["out"].sum()
            if until == "backward":
                kept["loss"].backward()

        if until != "backward":
            kept["out"] = attention(*inputs, mask)
            kept["out"].sum().backward()
        return step

    return make


# --- GPT-2 of LLMs-from-scratch


class HandNorm(nn.Module):
    """Layer norm, written by hand."""

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return self.scale * normed + self.shift


class HandGELU(nn.Module):
    """The approximation by tanh, written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class GPTAttention(nn.Module):
    def __init__(self, fused: bool, buffers: bool):
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(768, 3 * 768, bias=False)
        else:
            self.q, self.k, self.v = (nn.Linear(768, 768, bias=False) for _ in range(3))
        self.out, self.drop = nn.Linear(768, 768), nn.Dropout(0.1)
        self.register_buffer("mask", torch.triu(torch.ones(1024, 1024), 1) if buffers else None)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, n, 3, 12, 64).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
            return self.out(y.transpose(1, 2).contiguous().view(b, n, 768))
        k, q, v = (f(x).view(b, n, 12, 64).transpose(1, 2) for f in (self.k, self.q, self.v))
        scores = q @ k.transpose(2, 3)
        mask = self.mask
        if mask is None:
            mask = torch.triu(torch.ones(n, n, device=x.device), 1)
        scores.masked_fill_(mask.bool(), -torch.inf)
        weights = self.drop(torch.softmax(scores / 64**0.5, -1))
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, 768))


class GPTBlock(nn.Module):
    def __init__(self, fused: bool, buffers: bool, by_hand: bool):
        super().__init__()
        norm = HandNorm if by_hand else nn.LayerNorm
        gelu = HandGELU() if by_hand else nn.GELU(approximate="tanh")
        self.att, self.drop = GPTAttention(fused, buffers), nn.Dropout(0.1)
        self.n1, self.n2 = norm(768), norm(768)
        self.ff = nn.Sequential(nn.Linear(768, 3072), gelu, nn.Linear(3072, 768))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.att(self.n1(x))) + x
        return self.drop(self.ff(self.n2(x))) + x


class GPT(nn.Module):
    def __init__(self, fused: bool, buffers: bool, by_hand: bool):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(GPTBlock(fused, buffers, by_hand) for _ in range(12)))
        self.norm = (HandNorm if by_hand else nn.LayerNorm)(768)
        self.head = nn.Linear(768, 50257, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(1024, device=tokens.device))
        return self.head(self.norm(self.blocks(self.drop(x))))


def gpt2(fused=False, buffers=False, by_hand=True, half=True, fused_optimizer=True):
    """LLMs-from-scratch, ch05/10_llm-training-speed: GPT-2 124M, 8 x 1024 tokens, dropout 0.1."""

    def make():
        model = GPT(fused, buffers, by_hand)
        model = (model.to(torch.bfloat16) if half else model).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused_optimizer)

        def loss_of(x, y):
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        def step():
            x, y = (torch.randint(0, 50257, (8, 1024)).cuda() for _ in range(2))
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()

        return step

    return make


# --- ViT-L/16 of pytorch-memory-optim


class ViTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(1024, eps=1e-6), nn.LayerNorm(1024, eps=1e-6)
        self.att = nn.MultiheadAttention(1024, 16, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        y, _ = self.att(y, y, y, need_weights=False)
        x = y + x
        return x + self.ff(self.n2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 1024, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 1024))
        self.places = nn.Parameter(torch.zeros(1, 197, 1024))
        self.blocks = nn.Sequential(*(ViTBlock() for _ in range(24)))
        self.norm, self.head = nn.LayerNorm(1024, eps=1e-6), nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x + self.places))[:, 0])


class Adam2023(torch.optim.Optimizer):
    """Adam of torch 2.1 for all parameters at once: its denominators are a copy of their own."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        m, v = ([self.state[p][name] for p in parameters] for name in "mv")
        torch._foreach_lerp_(m, grads, 0.1)
        torch._foreach_mul_(v, 0.999)
        torch._foreach_addcmul_(v, grads, grads, 0.001)
        roots = torch._foreach_sqrt(v)
        torch._foreach_addcdiv_(parameters, m, torch._foreach_add(roots, 1e-8), -1e-3)


def vit(batch: int, precision: str):
    """rasbt/pytorch-memory-optim: fine-tuning of ViT-L/16."""

    def make():
        half = precision == "bf16"
        model = (ViT().to(torch.bfloat16) if half else ViT()).cuda()
        optimizer, kept = Adam2023(model.parameters()), {}

        def step():
            x = torch.randn(batch, 3, 224, 224).cuda().to(torch.bfloat16 if half else torch.float32)
            with torch.autocast("cuda", torch.float16, enabled=precision == "fp16"):
                kept["logits"] = model(x)
            labels = torch.randint(0, 10, (batch,)).cuda()
            kept["loss"] = F.cross_entropy(kept["logits"], labels)
            optimizer.zero_grad()
            kept["loss"].backward()
            optimizer.step()

        return step

    return make


# --- issues
def shared_linear(times: int = 100):
    """TylerYep/torchinfo issue 144: one Linear(1024) applied 100 times to (10240, 1024)."""

    def make():
        layer, x, kept = nn.Linear(1024, 1024).cuda(), torch.zeros(10240, 1024, device="cuda"), []

        def step():
            y = x
            for _ in range(times):
                y = layer(y)
            kept[:] = [y]

        return step

    return make


def issue_104604():
    """pytorch issue 104604: Linear(1024, 1024, bias=False) on (1, 512, 1024)."""

    def make():
        layer = nn.Linear(1024, 1024, bias=False).cuda()
        x, kept = torch.rand(1, 512, 1024).cuda(), {}

        def step():
            kept["y"] = layer(x)

        return step

    return make


def issue_72450(until: str):
    """pytorch issue 72450: softmax and mean of 3 GB in bfloat16, whose name is used again."""

    def make():
        kept = {
            "x": torch.rand(
                5120, 2, 384, 384, dtype=torch.bfloat16, device="cuda", requires_grad=True
            )
        }

        def step():
            kept["x"] = F.softmax(kept["x"], dim=-1)
            kept["loss"] = kept["x"].mean()
            if until == "backward":
                kept["loss"].backward()

        return step

    return make


# --- readings and predictions


@cache
def predicted(
    program: str, arguments: str, options: str, steps: int, gpu: str, attention: str = "auto"
) -> dict:
    """Bytes of what a reading may be of, with and without the workspaces of cuBLAS."""
    make = globals()[program](*json.loads(arguments), **json.loads(options))
    found = predict(make, attention=attention, steps=steps, gpu=gpu)
    timeline = found.timeline
    start, workspaces = timeline.steps[-1], cublas_workspaces(timeline, gpu)
    full = replace(timeline, blocks=[*timeline.blocks, *workspaces])
    emptied = replay(full, empty_cache_after=[start])
    return {
        "peak": found.peak,
        "end": timeline.allocated()[-1],
        "since": timeline.peak(start=timeline.steps[-1]).allocated,  # of the last step
        "reserved": found.reserved,
        # The cache is emptied before the last step.
        "reserved, emptied": int(max(emptied.reserved[start + 1 :], default=0)),
        "workspaces": found.workspaces,
        "seconds": found.seconds,
    }


def readings(*programs: str) -> list[dict]:
    """All readings, or those of some programs, each with its source."""
    found = []
    for group in json.loads(READINGS.read_text()):
        shared = {name: value for name, value in group.items() if name != "readings"}
        rows = (shared | row for row in group["readings"])
        found += [row for row in rows if not programs or row["program"] in programs]
    return found


def compared(row: dict) -> dict:
    """A reading beside its prediction."""
    of, read = row["of"], row["value"] * UNITS[row["unit"]]
    texts = (json.dumps(row.get(name, {})) for name in ("arguments", "options"))
    what = (row["program"], *texts, row["steps"], row["kind"])
    found = predicted(*what)
    counts = not of.startswith("reserved") and row["torch"] != "1.11" and "2022" not in row["torch"]
    expected = found[of] + (found["workspaces"] if counts else 0)
    row |= {
        "read": round(read),
        "predicted": expected,
        "error": round(expected / read - 1, 6),
        "error_without_workspaces": round(found[of] / read - 1, 6),
        "seconds_to_predict": round(found["seconds"], 2),
    }
    if "or_attention" in row:  # which kernel ran is not known
        other = predicted(*what, attention=row["or_attention"])[of]
        row["error_of_other_kernel"] = round(other / read - 1, 6)
    return row


def is_new(row: dict) -> bool:
    """Whether it was read with torch 2.6 or later."""
    found = re.match(r"(\d+)\.(\d+)", row["torch"])
    return found is not None and tuple(map(int, found.groups())) >= (2, 6)


def summary(rows: list[dict]) -> str:
    """A line for each source and each kind of reading."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        kind = "reserved" if row["of"].startswith("reserved") else "allocated"
        groups.setdefault((row["source"], row["torch"], row["gpu"], kind), []).append(row)
    lines = []
    for key, group in groups.items():
        sizes = sorted(row["read"] / 2**30 for row in group)
        errors = [100 * row["error"] for row in group]
        worst = max(errors, key=abs)
        middle = statistics.median(map(abs, errors))
        span = f"{sizes[0]:.3f} – {sizes[-1]:.3f}" if len(sizes) > 1 else f"{sizes[0]:.3f}"
        lines.append([*key, len(group), span, f"{middle:.3f}", f"{worst:+.3f}"])
    columns = ["source", "torch", "GPU", "of", "readings", "GiB", "median, %", "worst, %"]
    return table(columns, lines)


def main() -> None:
    """Predict, record, print."""
    chosen = sys.argv[1:]
    rows = []
    for row in readings(*chosen):
        rows.append(compared(row))
        last = rows[-1]
        print(
            f"{100 * last['error']:+8.3f} %  {last['value']} {last['unit']} {last['what']}, "
            f"{last['program']} {last['arguments']} {last.get('options', '')}",
            flush=True,
        )
    print(summary(rows))
    for of in ("allocated", "reserved"):
        errors = [
            abs(row["error"])
            for row in rows
            if is_new(row) and row["of"].startswith("reserved") == (of == "reserved")
        ]
        if errors:
            print(
                f"torch >= 2.6, {of}: {len(errors)} readings, median "
                f"{statistics.median(errors):.3%}, worst {max(errors):.3%}"
            )
    if not chosen:
        record("gpu_readings", "cpu", {"rows": rows})


if __name__ == "__main__":
    main()
