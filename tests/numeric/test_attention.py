"""Distributed attention through every kernel, in every type, against the literal parts in float64 on the CPU."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations import flex_attention as library
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from modeling_sparse_moe_vlm.distributed_attention import attend_by_channels, attend_by_row, attend_in_parts

B, H, H_KV, D, M = 2, 4, 2, 64, 3
LENGTH = 48
SCALING = D**-0.5  # so small that the log-prior that leaves a part out is beyond float16
KERNELS = {
    "eager": None,
    "sdpa": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest relative difference (of norms): a few roundings, of inputs, attention probabilities and outputs.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


class Module(torch.nn.Module):
    """The attributes of an attention module that attention functions read."""

    num_key_value_groups = H // H_KV
    is_causal = True


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def make_ids() -> torch.Tensor:
    """Text, an image, text, another modality, text; the second row is shifted."""
    ids = torch.zeros(B, LENGTH, dtype=torch.long)
    ids[:, 6:26], ids[:, 34:40] = 1, 2
    ids[1] = ids[1].roll(3)
    return ids


def make_tensors(dtype: torch.dtype, queries: int = LENGTH) -> list[torch.Tensor]:
    """Query, key and value, rounded to `dtype`, log-priors, and a direction for the gradients; in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, H, queries, D), (B, H_KV, LENGTH, D), (B, H_KV, LENGTH, D), (B, queries, H, D)]
    query, key, value, direction = (torch.randn(size, generator=generator).to(dtype).double() for size in sizes)
    return [query, key, value, torch.randn(H, M, generator=generator).double(), direction]


def reference(tensors, guidance: float = 0.0, gradients: bool = True) -> dict[str, torch.Tensor]:
    def attend(query, key, value, log_priors):
        visible = torch.ones(query.shape[2], LENGTH, dtype=torch.bool).tril(LENGTH - query.shape[2])[None, None]
        options = {"scaling": SCALING, "log_priors": log_priors, "guidance": guidance}
        return attend_in_parts(query, key, value, make_ids(), M, visible=visible, **options)

    return results(attend, tensors, gradients)


def results(attend, tensors, gradients: bool = True) -> dict[str, torch.Tensor]:
    """Output, weights and gradients, in float64 on the CPU."""
    *inputs, direction = tensors
    inputs = [tensor.detach().clone().requires_grad_(gradients) for tensor in inputs]
    merged = attend(*inputs)
    found = {"output": merged.output, "weights": merged.weights}
    if gradients:
        (merged.output * direction).sum().backward()
        found |= dict(zip(("query", "key", "value", "log_priors"), (tensor.grad for tensor in inputs), strict=True))
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def place(tensors, device, dtype) -> list[torch.Tensor]:
    query, key, value, log_priors, direction = (tensor.to(device) for tensor in tensors)
    return [query.to(dtype), key.to(dtype), value.to(dtype), log_priors.float(), direction.to(dtype)]


def assert_close(actual, expected, dtype) -> None:
    for name, tensor in expected.items():
        # The gradient of a prior sums up terms that almost cancel out.
        bound = TOLERANCES[dtype] * (4 if name == "log_priors" else 1)
        assert (actual[name] - tensor).norm() / tensor.norm() < bound, name


def choose(kernel: str, device: torch.device, dtype: torch.dtype):
    """The context in which SDPA uses a kernel, and skips where the device has none for this type."""
    backend = KERNELS[kernel]
    if backend is None:
        return nullcontext()
    on_cpu = device.type == "cpu"
    if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) and on_cpu:
        pytest.skip("only on GPUs")
    if backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) and dtype == torch.float32 and not on_cpu:
        pytest.skip("only in half precision")
    if backend == SDPBackend.CUDNN_ATTENTION and not torch.backends.cudnn.is_available():
        pytest.skip("cuDNN is not available")
    return sdpa_kernel(backend)


def run_channels(kernel, device, dtype, tensors, guidance: float = 0.0, gradients: bool = True):
    ids, mask, function = make_ids().to(device), None, ALL_ATTENTION_FUNCTIONS["sdpa"]
    if kernel == "eager":
        function = eager_attention_forward
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril()[None, None]
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)

    def attend(query, key, value, log_priors):
        options = {"scaling": SCALING, "log_priors": log_priors, "guidance": guidance}
        return attend_by_channels(function, Module(), query, key, value, mask, ids, M, **options)

    with choose(kernel, device, dtype):
        return results(attend, place(tensors, device, dtype), gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_by_channels(kernel, dtype, device):
    """Forward with the read-out, and every gradient, including those of learned priors."""
    tensors = make_tensors(dtype)
    assert_close(run_channels(kernel, device, dtype, tensors), reference(tensors), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_guidance(kernel, dtype, device):
    tensors = make_tensors(dtype)
    actual = run_channels(kernel, device, dtype, tensors, guidance=0.7, gradients=False)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    assert_close(actual, reference(tensors, guidance=0.7, gradients=False), dtype)


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_one_query(guidance, dtype, device):
    tensors = make_tensors(dtype, queries=1)

    def attend(query, key, value, log_priors):
        options = {"scaling": SCALING, "log_priors": log_priors, "guidance": guidance}
        return attend_by_row(query, key, value, None, make_ids().to(device), M, **options)

    actual = results(attend, place(tensors, device, dtype))
    assert_close(actual, reference(tensors, guidance), dtype)


def test_flex(dtype, device, monkeypatch):
    """Compiled on a GPU, with gradients; uncompiled on the CPU, which has none for it."""
    on_gpu = device.type != "cpu"
    if not on_gpu:
        # Compiling takes half a minute there.
        torch.compiler.set_stance("force_eager")
        monkeypatch.setattr(
            library,
            "compile_friendly_flex_attention",
            lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
        )
    tensors = make_tensors(dtype)
    mask = create_block_mask(lambda b, h, q, k: q >= k, B, None, LENGTH, LENGTH, device=device)

    def attend(query, key, value, log_priors):
        function = ALL_ATTENTION_FUNCTIONS["flex_attention"]
        options = {"scaling": SCALING, "log_priors": log_priors}
        return attend_by_channels(function, Module(), query, key, value, mask, make_ids().to(device), M, **options)

    try:
        actual = results(attend, place(tensors, device, dtype), gradients=on_gpu)
    finally:
        torch.compiler.set_stance("default")
    assert_close(actual, reference(tensors, gradients=on_gpu), dtype)
