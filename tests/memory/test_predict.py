"""Predictions: equal to traces of real tensors, to arithmetic, and to a reading from a GPU."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch._dynamo  # before the heap is frozen
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tfswa_lab.memory.predict import predict
from tfswa_lab.memory.predict.cuda_attention import present_gpu
from tfswa_lab.memory.predict.predict import compare, max_batch_size, to_markdown
from tfswa_lab.memory.trace import trace
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer
from tfswa_lab.models.tfswa_unet import TFSWAUNet

pytestmark = pytest.mark.usefixtures("new_objects_only")

MIB = 2**20


def linear_chain(layers=100):
    """Of torchinfo's issue 144."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1024, 1024)

        def forward(self, x):
            for _ in range(layers):
                x = self.linear(x)
            return x

    def make_step():
        model, x = Chain(), torch.zeros(10240, 1024)
        return lambda: model(x)

    return make_step


def training(
    batch=1, net=lambda: TFLocoformer(4, 16, **SIZES["tiny"]), precision=None, t=32, f=65, **of
):
    """A training step of a network of 4 and 16 channels."""
    model = net(**of)
    optimizer = torch.optim.AdamW(model.parameters())
    x, target = torch.randn(batch, 4, t, f), torch.randn(batch, 16, t, f)

    def step():
        with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
            estimate = model(x)
        loss = (estimate.float() - target).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def test_a_public_reading_from_a_gpu_to_the_byte():
    """torch.cuda.memory_allocated() in https://github.com/TylerYep/torchinfo/issues/144."""
    prediction = predict(linear_chain(), steps=1)
    assert prediction.peak == 4044.00390625 * MIB


def test_the_same_blocks_as_of_real_tensors_but_for_rounding():
    """Without attention and optimizer, whose kernels are CUDA's."""

    def make_step():
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 2, 3))
        x = torch.randn(3, 4, 30, 41)
        return lambda: net(x).square().mean().backward()

    prediction = predict(make_step)
    with trace() as seen:
        step = make_step()
        for _ in range(2):
            seen.step()
            step()
    ours, theirs = prediction.timeline.blocks, seen.timeline().blocks
    for name in ("size", "op", "category", "phase", "module", "born", "died", "step"):
        of_ours, of_theirs = ([getattr(b, name) for b in blocks] for blocks in (ours, theirs))
        assert of_ours == of_theirs, name
    assert all(b.rounded % 512 == 0 for b in ours)
    assert all(0 <= b.rounded - b.size < 512 for b in ours)


def test_the_math_kernel_keeps_all_scores_and_the_others_do_not():
    b, h, length, width = 2, 4, 512, 32

    def make_step():
        q, k, v = (torch.randn(b, h, length, width, requires_grad=True) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()

    of_tokens = 4 * b * h * length * width
    scores = 4 * b * h * length * length
    math, efficient = (predict(make_step, attention=a).peak for a in ("math", "efficient"))
    assert math > 2 * scores
    assert efficient < 12 * of_tokens < scores


def test_the_math_kernel_keeps_scores_in_float32_whatever_it_is_given():
    """As on the CPU, where it can be seen: autocast is over when the kernel begins."""
    b, h, length, width = 1, 2, 128, 16

    def make_step(device="cuda"):
        q, k, v = (torch.randn(b, h, length, width, requires_grad=True) for _ in range(3))

        def step():
            with torch.autocast(device, dtype=torch.bfloat16):
                out = F.scaled_dot_product_attention(q, k, v)
            out.float().sum().backward()

        return step

    def scores(blocks):
        return Counter(b.dtype for b in blocks if b.shape[-2:] == (length, length))

    predicted = predict(make_step, attention="math", steps=1).timeline.blocks
    with trace() as seen, sdpa_kernel(SDPBackend.MATH):
        make_step("cpu")()
    assert scores(predicted) == scores(seen.timeline().blocks)
    assert scores(predicted)["float32"]


def test_dropout_keeps_a_byte_per_element():
    def make_step():
        x = torch.randn(1000, 512, requires_grad=True)
        return lambda: F.dropout(x, 0.1).sum().backward()

    kept = [b for b in predict(make_step).timeline.blocks if b.dtype == "bool"]
    assert {b.size for b in kept} == {512_000}


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy, F.soft_margin_loss, F.l1_loss]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_some_losses_keep_the_memory_of_all_elements(loss, reduction):
    """Torch shortens the result in place; real tensors on the CPU show it."""
    x, y = torch.rand(2, 1000)
    real = loss(x, y, reduction=reduction).untyped_storage().nbytes()
    found = []

    def make_step():
        x, y = torch.rand(1000), torch.rand(1000)
        return lambda: found.append(loss(x, y, reduction=reduction).untyped_storage().nbytes())

    predict(make_step, steps=1)
    assert found == [real]


def test_dropout_in_place_keeps_a_number_per_element():
    def make_step(inplace):
        x = torch.randn(1000, 512, requires_grad=True)
        return lambda: F.dropout(x * 1, 0.1, inplace=inplace).sum().backward()

    found = predict(lambda: make_step(True)).timeline.blocks
    assert not any(block.dtype == "bool" for block in found)


def test_a_model_in_which_nothing_moves_counts_as_much_if_it_is_older():
    def make_step(net):
        return lambda: net(torch.zeros(8, 512)).sum().backward()

    build = lambda: nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])  # noqa: E731
    older = build()
    assert predict(lambda: make_step(older)).peak == predict(lambda: make_step(build())).peak


def test_optimizers_update_all_parameters_at_once_as_on_cuda():
    step = predict(training)
    operators = {block.op for block in step.timeline.blocks}
    assert any(operator.startswith("aten._foreach_") for operator in operators)


@pytest.mark.parametrize(
    ("run", "kept"),
    [
        (lambda x: F.layer_norm(x, (64,)), torch.float32),
        (lambda x: x.softmax(-1), torch.float32),
        (lambda x: x.exp(), torch.float32),
        (lambda x: x.sum(), torch.float32),
        (lambda x: F.group_norm(x, 4), torch.float32),
        (lambda x: F.gelu(x), torch.bfloat16),
        (lambda x: F.linear(x.float(), torch.ones(64, 64)), torch.bfloat16),
        (lambda x: torch.einsum("ij,kj->ik", x.float(), x.float()), torch.bfloat16),
        (lambda x: F.mse_loss(x, x), torch.float32),
        (lambda x: F.scaled_dot_product_attention(*[x.float()[None, None]] * 3), torch.bfloat16),
    ],
)
def test_autocast_has_cudas_lists(run, kept):
    found = []

    def make_step():
        x = torch.randn(8, 64, dtype=torch.bfloat16)

        def step():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                found.append(run(x).dtype)

        return step

    predict(make_step, steps=1)
    assert found == [kept]


def test_cudas_default_of_autocast_is_half():
    found = []

    def make_step():
        def step():
            with torch.autocast("cuda"):
                found.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            with torch.autocast("cuda", enabled=False):
                found.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

        return step

    predict(make_step, steps=1)
    assert found == [torch.float16, torch.float32]


def test_torch_is_as_before():
    before = F.scaled_dot_product_attention, F.dropout, torch.autocast.__init__
    with pytest.raises(ZeroDivisionError):
        predict(lambda: lambda: 1 / 0)
    assert before == (F.scaled_dot_product_attention, F.dropout, torch.autocast.__init__)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert x.exp().dtype == torch.bfloat16  # the CPU's list again
    state = torch.get_rng_state()
    predict(training, steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_trades_activations():
    plain = predict(lambda: training(net=lambda: TFLocoformer(4, 16, **SIZES["tiny"])))
    saved = predict(
        lambda: training(
            net=lambda: TFLocoformer(4, 16, **SIZES["tiny"], activation_checkpointing="path")
        )
    )
    assert saved.peak < plain.peak
    assert any(block.phase == "recompute" for block in saved.timeline.blocks)


def test_the_peak_is_affine_in_the_batch():
    """But for the megabyte that the allocator may add to each large block."""
    found = [predict(lambda batch=batch: training(batch)) for batch in (4, 8, 12)]
    asked = [prediction.timeline.peak().allocated for prediction in found]
    assert asked[1] - asked[0] == pytest.approx(asked[2] - asked[1], rel=1e-3)
    given = [prediction.peak for prediction in found]
    assert all(a <= b < 1.05 * a for a, b in zip(asked, given, strict=True))


def test_the_largest_batch_fits_and_one_more_does_not():
    budget = 200 * MIB
    batch = max_batch_size(training, budget, slack=0.0)
    assert predict(lambda: training(batch)).peak <= budget
    assert predict(lambda: training(batch + 1)).peak > budget
    assert max_batch_size(training, budget, slack=0.5) < batch
    assert max_batch_size(training, MIB) == 0


def test_a_batch_that_does_not_matter_is_named():
    with pytest.raises(ValueError, match="does make_step use its batch size"):
        max_batch_size(lambda batch: training(1), 2**30)
    with pytest.raises(ValueError, match=r"slack=1\.5"):
        max_batch_size(training, 2**30, slack=1.5)


def test_comparisons_are_tables_of_all_combinations():
    choices = {"batch": [1, 2], "attention": ["math", "efficient"]}
    rows = list(compare(training, choices))
    assert [row.choices for row in rows] == [
        {"batch": batch, "attention": attention}
        for batch in (1, 2)
        for attention in ("math", "efficient")
    ]
    table = to_markdown(rows, budget=rows[0].prediction.peak).splitlines()
    assert table[0] == "| batch | attention | peak | reserved, about | fits |"
    assert [line.endswith("yes |") for line in table[2:]] == [True, True, False, False]


def test_shifted_windows_and_masks_work_with_every_kernel():
    net = lambda: TFSWAUNet(4, 16, (16, 16, 16, 16), (2, 1, 1, 1), 2, 2)  # noqa: E731
    peaks = {
        kernel: predict(lambda: training(net=net), attention=kernel).peak
        for kernel in ("math", "efficient")
    }
    half = predict(lambda: training(net=net, precision=torch.bfloat16)).peak
    assert half < peaks["efficient"] < peaks["math"]


def test_waveforms_can_pass_through_spectra_and_back():
    def make_step():
        window = torch.hann_window(512)
        gain = nn.Parameter(torch.ones(257, 1))
        x = torch.randn(2, 8000)

        def step():
            spectra = torch.stft(x, 512, window=window, return_complex=True)
            y = torch.istft(spectra * gain, 512, window=window, length=8000)
            (y - x).square().mean().backward()

        return step

    prediction = predict(make_step)
    assert prediction.peak > 0
    assert any("cuFFT" in sentence for sentence in prediction.budget)
    scratch = [b for b in prediction.timeline.blocks if b.op == "aten._fft_c2r.default"]
    assert len({b.size for b in scratch}) == 2  # the output, and the copy of the input


def test_what_depends_on_values_is_named_with_its_line():
    def make_step():
        x = torch.randn(100)
        return lambda: x[x > 0].sum()

    with pytest.raises(NotImplementedError, match=r"test_predict\.py:\d+ depends on the values"):
        predict(make_step)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_may_be_written_for_a_gpu(device):
    def make_step():
        model = nn.Linear(512, 256, device=device)
        other = nn.Linear(256, 128, bias=False).to(device=device, dtype=torch.bfloat16)
        third = nn.Linear(256, 128, bias=False).cpu().to(torch.device(device))
        x = torch.randn(16, 512).to(device)

        def step():
            y = model(x)
            target = torch.zeros(16, 128, device=y.device)
            (other(y.bfloat16()) + third(y) - target).sum().backward()

        return step

    prediction = predict(make_step)
    parameters = 4 * (512 * 256 + 256 + 256 * 128) + 2 * 256 * 128
    assert prediction.by_category()["parameter"] == parameters


def attention_of(batch, length, width, dtype=torch.bfloat16):
    def make_step():
        q, k, v = (torch.empty(batch, 2, length, width, dtype=dtype) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)

    return make_step


def kernel_of(make_step, **gpu):
    operators = {block.op for block in predict(make_step, steps=1, **gpu).timeline.blocks}
    known = ("cudnn", "flash", "efficient")
    return next((name for name in known if any(name in op for op in operators)), "math")


@pytest.mark.parametrize(
    ("shape", "on_hopper"),
    [
        ((2, 16, 32), "cudnn"),
        ((2, 16, 128), "cudnn"),
        ((2, 16, 136), "flash"),  # wider than cuDNN takes
        ((2, 16, 20), "flash"),  # no multiple of eight
        ((2, 1, 32), "flash"),  # a sequence of length 1
        ((32_768, 2, 32), "flash"),  # 65,536 rows of batch and heads
        ((32_767, 2, 32), "cudnn"),
        ((2, 16, 32, torch.float32), "efficient"),
    ],
)
def test_auto_is_the_gpus_own_choice(shape, on_hopper, monkeypatch):
    make_step = attention_of(*shape)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_of(make_step, gpu="hopper") == on_hopper
    assert kernel_of(make_step, gpu="ampere") == on_hopper.replace("cudnn", "flash")
    assert kernel_of(make_step) == on_hopper.replace("cudnn", "flash"), "no GPU is here"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 8, 32, 128])
def test_the_default_kernel_of_the_present_gpu_is_the_predicted_one(width, dtype):
    qkv = (torch.randn(2, 2, 16, width, device="cuda", dtype=dtype) for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(*qkv)).name.split("_")[0].lower()
    assert kernel_of(attention_of(2, 16, width, dtype)) == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("gpu", ["ampere", "hopper"])
def test_a_prediction_is_the_same_beside_a_gpu_and_without_one(gpu):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_predict as t\n"
        f"print(t.predict(t.training, gpu={gpu!r}).peak)"
    )
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=True)
    assert predict(training, gpu=gpu).peak == int(done.stdout)


@pytest.mark.parametrize(
    ("capability", "cudnn", "gpu"),
    [
        ((9, 0), 91900, "hopper"),
        ((10, 0), 91501, "hopper"),
        ((10, 3), 91900, "hopper"),
        ((9, 0), 91500, "ampere"),
        ((8, 0), 91900, "ampere"),
        ((12, 0), 91900, "ampere"),
    ],
)
def test_the_present_gpu_decides_where_none_is_named(monkeypatch, capability, cudnn, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    assert present_gpu() == gpu
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert present_gpu() == "ampere"


def heads(query, groups, kernels=None, **options):
    """Attention of 16 heads in bfloat16, whose keys and values have `groups` heads."""

    def make_step():
        def step():
            q = torch.randn(1, query, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
            k, v = (torch.randn(1, groups, 4096, 64, dtype=torch.bfloat16) for _ in range(2))
            k.requires_grad_()
            with sdpa_kernel(kernels) if kernels else nullcontext():
                F.scaled_dot_product_attention(q, k, v, **options).sum().backward()

        return step

    return make_step


def test_groups_of_heads_take_the_flash_kernel_in_half_precision():
    grouped = heads(16, 4, is_causal=True, enable_gqa=True)
    whole = heads(16, 16, is_causal=True)
    assert kernel_of(grouped, gpu="ampere") == "flash"
    assert kernel_of(grouped, gpu="hopper") == "cudnn"
    assert predict(grouped).peak <= predict(whole).peak
    backward = "aten._scaled_dot_product_flash_attention_backward.default"
    extra = [
        max(
            b.size
            for b in predict(make, steps=1).timeline.blocks
            if b.op == backward and not b.shape
        )
        for make in (grouped, whole)
    ]
    assert extra[0] - extra[1] == 2 * 16 * 4096 * 64 * 2, "gradients of keys and values per head"
    with pytest.raises(ValueError, match="efficient: it takes no groups of heads"):
        predict(grouped, attention="efficient")


def test_the_programs_own_choice_of_kernels_is_respected():
    for kernel, name in (
        (SDPBackend.MATH, "math"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
    ):
        assert kernel_of(heads(16, 16, kernels=[kernel])) == name

    def make_step():
        q = torch.randn(1, 2, 64, 32, dtype=torch.bfloat16)

        def step():
            with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
                F.scaled_dot_product_attention(q, q, q)

        return step

    assert kernel_of(make_step) == "math"
    mask = {"attn_mask": torch.zeros(4096, 4096, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match="none of the allowed kernels can run here: flash: it tak"):
        predict(heads(16, 16, kernels=[SDPBackend.FLASH_ATTENTION], **mask))


@pytest.mark.parametrize(
    ("q", "k", "options", "kernel"),
    [
        ((2, 4, 16, 32), (2, 4, 24, 32), {"is_causal": True}, "efficient"),  # not square
        ((2, 4, 16, 32), (2, 4, 24, 32), {"attn_mask": "lower right"}, "flash"),
        ((2, 4, 16, 32), (2, 4, 24, 32), {"attn_mask": "upper left"}, "efficient"),
        ((2, 4, 16, 32), (2, 4, 16, 32), {"attn_mask": "upper left"}, "flash"),
        ((2, 4, 16, 32), (2, 4, 16, 32), {"attn_mask": "numbers"}, "efficient"),
        ((2, 4, 16, 32), (2, 4, 16, 32), {"attn_mask": "numbers", "is_causal": True}, "efficient"),
        ((4, 16, 32), (4, 16, 32), {}, "math"),  # no axis of heads
        ((2, 4, 16, 32), (2, 1, 16, 32), {}, "math"),  # heads are broadcast
    ],
)
def test_shapes_and_masks_decide_the_kernel(q, k, options, kernel):
    masks = {
        "lower right": lambda: causal_lower_right(q[-2], k[-2]),
        "upper left": lambda: causal_upper_left(q[-2], k[-2]),
        "numbers": lambda: torch.zeros(q[-2], k[-2], dtype=torch.bfloat16),
    }

    def make_step():
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16) for shape in (q, k, k))
        chosen = options | {n: masks[m]() for n, m in options.items() if n == "attn_mask"}
        return lambda: F.scaled_dot_product_attention(query, key, value, **chosen)

    assert kernel_of(make_step) == kernel


def test_flex_attention_keeps_an_output_and_a_sum_per_row():
    def make_step():
        shape = 1, 8, 1024, 64
        q, k, v = (torch.randn(shape, device="cuda", requires_grad=True) for _ in range(3))
        return lambda: flex_attention(q, k, v).sum().backward()

    found = predict(make_step, steps=1)
    tokens = 8 * 1024 * 64 * 4
    assert 7 * tokens < found.peak < 8 * tokens, "three, an output, its gradient, three gradients"
    assert any("flex_attention at test_predict.py" in sentence for sentence in found.budget)

    def masked():
        mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 1024, 1024, device="cuda")
        q = torch.randn(1, 8, 1024, 64, device="cuda", requires_grad=True)
        return lambda: torch.compile(flex_attention)(q, q, q, block_mask=mask).sum().backward()

    assert not any("torch.compile: " in sentence for sentence in predict(masked).budget)


def test_nested_tensors_are_refused_with_bounds():
    parts = [torch.randn(5, 8), torch.randn(9, 8)]
    with pytest.raises(NotImplementedError, match=r"unknown kernel\. Bounds are two predictions"):
        predict(lambda: lambda: torch.nested.nested_tensor(parts, layout=torch.jagged))


def test_functions_that_were_imported_by_name_are_replaced_too():
    attend, drop = F.scaled_dot_product_attention, F.dropout

    def make_step():
        q = torch.randn(1, 2, 64, 32, dtype=torch.bfloat16, requires_grad=True)
        return lambda: drop(attend(q, q, q), 0.1).sum().backward()

    assert kernel_of(make_step, gpu="ampere") == "flash"
    assert any(b.dtype == "bool" for b in predict(make_step).timeline.blocks)


def test_autocast_keeps_its_casts_of_parameters_until_it_ends():
    def make_step(function):
        weights = [nn.Parameter(torch.randn(512, 512)) for _ in range(8)]

        def step():
            x = torch.randn(4, 512)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                for weight in weights:
                    x = function(x, weight)

        return step

    einsum = predict(lambda: make_step(lambda x, w: torch.einsum("bi,oi->bo", x, w)))
    linear = predict(lambda: make_step(F.linear))
    casts = 8 * 512 * 512 * 2
    for found in (einsum, linear):
        assert found.peak == pytest.approx(8 * 512 * 512 * 4 + casts, rel=0.01)
        held = [b for b in found.timeline.blocks if b.size == 512 * 512 * 2]
        assert {b.died is None for b in held} == {False}, "gone after each step"


def test_the_backward_pass_of_softmax_multiplies_gradient_and_output():
    """The peak in https://github.com/pytorch/pytorch/issues/72450, with 2**-10 of its rows."""

    def make_step():
        kept = {"x": torch.rand(5, 2, 384, 384, dtype=torch.bfloat16, requires_grad=True)}

        def step():
            kept["x"] = F.softmax(kept["x"], dim=-1)
            kept["x"].mean().backward()

        return step

    whole = 15_099_495_424 / 3_019_898_880  # of the issue: five times the input
    one = 5 * 2 * 384 * 384 * 2
    assert predict(make_step, steps=1).peak / one == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("gpu", "each"), [("ampere", 8_519_680), ("hopper", 33_554_432)])
def test_cublas_keeps_a_workspace_for_each_thread(gpu, each):
    """8.125 MiB in https://github.com/pytorch/pytorch/issues/104604; two with a backward pass."""

    def make_step(backward):
        layer, x = nn.Linear(1024, 1024, bias=False).cuda(), torch.rand(1, 512, 1024).cuda()
        return lambda: layer(x).sum().backward() if backward else layer(x)

    forward, both = (predict(lambda b=b: make_step(b), gpu=gpu) for b in (False, True))
    assert (forward.workspaces, both.workspaces) == (each, 2 * each)
    assert both.reserved >= both.peak + both.workspaces
    assert predict(lambda: lambda: torch.zeros(9).exp(), gpu=gpu).workspaces == 0


def test_the_host_keeps_what_is_not_moved():
    def rows_of_a_data_set():
        data, net = torch.randn(4096, 65536), nn.Linear(65536, 16).cuda()  # 1 GiB on the host
        at = iter(range(9))

        def step():
            k = next(at)
            net(data[8 * k : 8 * k + 8].cuda()).sum().backward()
            net.zero_grad()

        return step

    found = predict(rows_of_a_data_set)
    assert found.peak / MIB == pytest.approx(10, abs=0.01)  # of weights 4, gradients 4, input 2
    assert found.host.allocated == 2**30 + 4 * (65536 * 16 + 16)
    assert found.names_gpu


def test_a_cast_before_the_move_is_the_hosts():
    def half():
        net = nn.Linear(8192, 8192, bias=False).to(torch.bfloat16).cuda()

        def step():
            with torch.no_grad():
                net(torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16))

        return step

    found = predict(half)
    assert found.peak / MIB == pytest.approx(128.03, abs=0.01)
    assert found.host.allocated == 6 * 8192**2


def deep(offloaded):
    net = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(20)]).cuda()

    def step():
        with torch.autograd.graph.save_on_cpu() if offloaded else nullcontext():
            y = net(torch.randn(8192, 256, device="cuda"))
        y.sum().backward()

    return step


def test_activations_saved_on_the_cpu_leave_the_gpu():
    plain, offloaded = (predict(lambda off=off: deep(off)) for off in (False, True))
    assert plain.peak / MIB == pytest.approx(346.29, abs=0.01)
    assert offloaded.peak < plain.peak / 5
    assert offloaded.host.allocated > 0.9 * (plain.peak - offloaded.peak)


def test_an_optimizer_on_the_host_has_its_state_there():
    def make_step():
        net = nn.Linear(1024, 1024, bias=False).cuda()
        copy = nn.Parameter(net.weight.detach().cpu())
        optimizer = torch.optim.Adam([copy])

        def step():
            net(torch.randn(8, 1024, device="cuda")).sum().backward()
            copy.grad = net.weight.grad.cpu()
            net.zero_grad()
            optimizer.step()
            with torch.no_grad():
                net.weight.copy_(copy)

        return step

    found = predict(make_step)
    held = dict(found.host.timeline.held_by(found.host.timeline.events, lambda b: b.category))
    assert held["optimizer state"] == 2 * 4 * 1024**2 + 4
    assert found.peak < 9 * MIB


def test_optimizers_keep_their_parameters_when_a_model_moves():
    """As torch's own `.cuda()` does: parameters stay the same objects, tied ones stay tied."""

    def make_step():
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        net[1].weight = net[0].weight
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
        net.cuda().to(torch.bfloat16)
        assert net[1].weight is net[0].weight

        def step():
            net(torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
            optimizer.step()

        return step

    state = [b for b in predict(make_step).timeline.blocks if b.category == "optimizer state"]
    assert sorted(b.size for b in state) == [2 * 64, 2 * 64, 2 * 64 * 64]


def test_tensors_on_other_devices_do_not_mix():
    with pytest.raises(RuntimeError, match=r"same device|different devices"):
        predict(lambda: lambda: nn.Linear(3, 3)(torch.zeros(3, 3, device="cuda")))
    with pytest.raises(NotImplementedError, match="cuda:1: a prediction has one GPU"):
        predict(lambda: lambda: torch.zeros(3, device="cuda:1"))


def test_a_device_is_chosen_as_on_a_machine_with_a_gpu():
    found = []

    def make_step():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        net = nn.Linear(64, 64).to(device)

        def step():
            x = torch.randn(8, 64).to(device)
            found.append((x.is_cuda, x.device.type, net(x).device == x.device, x.cpu().is_cpu))

        return step

    assert predict(make_step).names_gpu
    assert found == [(True, "cuda", True, True)] * 2
    assert not torch.cuda.is_available() or torch.cuda.device_count()


def test_a_program_that_names_no_gpu_lives_there_as_a_whole():
    found, named = predict(training), predict(lambda: training_on_gpu())
    assert not found.names_gpu
    assert found.host.allocated == 0
    assert "names no GPU" in str(found)
    assert found.peak == named.peak


def training_on_gpu():
    """`training`, with its tensors made on a GPU."""
    with torch.device("cuda"):
        return training()


def test_a_prediction_is_short_in_a_notebook():
    found = predict(lambda: deep(offloaded=True))
    assert len(repr(found)) < 100
    assert len(str(found).splitlines()) <= 25
    assert "on the host" in str(found)
    html = found._repr_html_()
    assert len(html) < 6000
    assert "by category" in html
    assert "by module" in html
    assert "not in these numbers" in html


@pytest.mark.parametrize("steps", [0, -1, True, "2", 1.5])
def test_the_number_of_steps_is_checked(steps):
    with pytest.raises(ValueError, match=r"steps=.* must be a whole number of at least 1"):
        predict(training, steps=steps)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"gpu='h100' is none of ampere, hopper"):
        predict(training, gpu="h100")
    with pytest.raises(TypeError, match="must return a function"):
        predict(lambda: None)
    with pytest.raises(ValueError, match=r"attention='fast' is none of"):
        predict(training, attention="fast")
    with pytest.raises(ValueError, match=r"flash.*use autocast"):
        predict(training, attention="flash")


def test_it_is_printed_with_what_it_cannot_see():
    text = str(predict(training))
    assert "activation" in text
    assert "not in these numbers" in text
    assert "cuBLAS" in text
