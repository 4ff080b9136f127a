"""What else decodes on the GPU, for `on_device.py`: each over the layout it is made for, with copies of the same data.

A peer that is not installed, or that does not take a case, raises `NotThere` with the reason.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvattn
from kvattn.attend.request import Request, adjust, grouped, ungrouped

FLASHINFER_PAGE = 64
"""Tokens per page in which FlashInfer, which has paged caches only, gets a contiguous one."""


class NotThere(Exception):
    """A peer is not installed, or does not do this."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A decode step over one of several copies of the cache.

    Attributes:
        run: takes a copy, queues one step, returns [B, T, N, H] or something of as many numbers in this order.
        copies: what it takes; a pytree of JAX arrays, or tensors.
        torch: whether these are PyTorch's.
        note: the layout, and what else a reader should know.
    """

    run: Callable[[Any], Any]
    copies: list[Any]
    torch: bool = False
    note: str = ""

    def values(self) -> np.ndarray:
        """The result for the first copy, in float32."""
        out = self.run(self.copies[0])
        return np.asarray(out.float().cpu() if self.torch else out.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a peer is given.

    Attributes:
        requests: a request per copy.
        lengths: [B], tokens of each row.
        fa3: file of vLLM's FA3 extension, or None.
        on_device: False: there is no GPU, only values are looked at.
    """

    requests: list[Request]
    lengths: np.ndarray
    fa3: str | None = None
    on_device: bool = True

    @property
    def request(self) -> Request:
        """The first."""
        return self.requests[0]

    @property
    def new(self) -> int:
        """T."""
        return self.request.query.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.request.view.layout.num_slots

    @property
    def paged(self) -> bool:
        """Whether there are pages."""
        return self.request.view.page_table is not None

    @property
    def plain(self) -> bool:
        """Whether numbers are stored as they are."""
        return isinstance(self.request.view.codec, kvattn.codecs.Plain)

    @property
    def full(self) -> bool:
        """Whether every row is full and one token sees all: no mask is needed."""
        return bool((self.lengths == self.slots).all()) and self.new == 1 and self.window is None

    @property
    def window(self) -> int | None:
        """How many tokens are seen."""
        return self.request.mask.window

    def need(self, condition: bool, what: str) -> None:
        """Raises `NotThere` unless."""
        if not condition:
            raise NotThere(what)


def rows_of(request: Request, rows: np.ndarray) -> Request:
    """The same request for a few rows."""
    view = request.view
    changes: dict[str, Any] = {"positions": view.positions[:, rows], "counts": view.counts[rows]}
    if view.page_table is None:
        changes |= {n: {k: x[:, rows] for k, x in getattr(view, n).items()} for n in ("keys", "values")}
    else:
        changes["page_table"] = view.page_table[rows]
    view = dataclasses.replace(view, **changes)
    return dataclasses.replace(request, query=request.query[rows], positions=request.positions[rows], view=view)


def einsum_attention(request: Request, dtype: Any, precision: Any = None) -> jax.Array:
    """Attention as one writes it with two einsums: everything decoded to `dtype` first. [B, T, N, H], float32."""
    view = request.view
    keys, values = view.dense(dtype)
    positions = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    query = grouped(request.query, view.num_kv_heads).astype(dtype)
    dots = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = adjust(dots("bkgth,bksh->bkgts", query, keys), request, request.positions, positions)
    allowed = request.mask.allowed(request.positions, positions)[:, :, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1).astype(dtype)
    # Unused slots may hold anything.
    values = jnp.where((positions >= 0)[..., None], values, 0) if dtype == jnp.float32 else values
    return ungrouped(dots("bkgts,bksh->bkgth", weights, values))


# JAX ------------------------------------------------------------------------------------------------------------------


def kvattn_with(implementation: str) -> Callable[[Problem], Program]:
    """Another implementation of kvattn."""

    def make(problem: Problem) -> Program:
        call = lambda request: kvattn.attend.attend(request, implementation)[0]
        return Program(jax.jit(call), problem.requests, note="as mosaic_gpu")

    return make


def einsums(problem: Problem) -> Program:
    """XLA, two einsums over [B, K, S, H]; coded numbers are decoded first, pages gathered."""
    note = "[B, K, S, H]" if problem.plain else "decoded to bfloat16, then [B, K, S, H]"
    return Program(jax.jit(lambda r: einsum_attention(r, jnp.bfloat16)), problem.requests, note=note)


def jax_nn(implementation: Any) -> Callable[[Problem], Program]:
    """`jax.nn.dot_product_attention`, on [B, S, K, H]."""

    def make(problem: Problem) -> Program:
        direct = problem.plain and not problem.paged
        problem.need(implementation == "xla" or problem.on_device, "cuDNN needs a GPU")
        lengths, mask = jnp.asarray(problem.lengths, jnp.int32), None
        if problem.new > 1 or problem.window is not None:
            mask = jnp.asarray(reachable(problem))[:, None]
        ragged: dict[str, Any] = {} if mask is not None or problem.full else {"key_value_seq_lengths": lengths}

        def run(copy):
            request, keys, values = copy
            if keys is None:
                keys, values = (x.swapaxes(1, 2) for x in request.view.dense(jnp.bfloat16))
            return jax.nn.dot_product_attention(
                request.query, keys, values, mask=mask, scale=request.scale, implementation=implementation, **ragged
            )

        copies = []
        for request in problem.requests:
            stored = (request.view.keys["data"], request.view.values["data"])
            pair = [x[0].swapaxes(1, 2) for x in stored] if direct else [None, None]
            small = dataclasses.replace(request, view=None) if direct else request
            copies.append((small, *pair))
        return Program(jax.jit(run), copies, note="[B, S, K, H]" if direct else "decoded or gathered first")

    return make


def jax_ops(problem: Problem) -> Program:
    """JAX's deprecated Triton kernels: `mqa`, `gqa`, `paged_attention`."""
    problem.need(problem.new == 1, "one new token only")
    how: dict[str, Any] = {} if problem.on_device else {"interpret": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode = importlib.import_module("jax.experimental.pallas.ops.gpu.decode_attention")
        paged = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    lengths, view = jnp.asarray(problem.lengths, jnp.int32), problem.request.view
    if problem.paged:
        problem.need(problem.window is None, "no window")
        problem.need(problem.plain or isinstance(view.codec, kvattn.Int8), "16 bits or int8")
        width = problem.slots // view.page_size
        how |= {"k_splits": math.gcd(16, width)}
        how |= {"pages_per_compute_block": math.gcd(width // how["k_splits"], max(1, 128 // view.page_size))}

        def run_paged(request):
            view = request.view
            scales = {f"{role[0]}_scales_pages": getattr(view, role)["scale"][:, :, 0] for role in ("keys", "values")
                      } if not problem.plain else {}  # fmt: skip
            query = (request.query[:, 0] * request.scale).astype(request.query.dtype)
            pages = (view.keys["data"], view.values["data"], view.page_table)
            return paged.paged_attention(query, *pages, lengths, **scales, **how)

        return Program(jax.jit(run_paged), problem.requests, note="paged_attention, [K, P, R, H]")
    problem.need(problem.plain, "16 bits only")
    single = view.num_kv_heads == 1
    start = None if problem.window is None else lengths - problem.window
    stop = None if problem.full else lengths

    def run(copy):
        query, keys, values = copy
        call = decode.mqa if single else decode.gqa
        return call(query, keys, values, start, stop, sm_scale=problem.request.scale, **how)

    lay = (lambda x: x[0, :, 0]) if single else (lambda x: x[0].swapaxes(1, 2))
    copies = [(r.query[:, 0], lay(r.view.keys["data"]), lay(r.view.values["data"])) for r in problem.requests]
    return Program(jax.jit(run), copies, note="mqa, [B, S, H]" if single else "gqa, [B, S, K, H]")


def reachable(problem: Problem) -> np.ndarray:
    """bool [B, T, S]: which slots each new token sees."""
    slot = np.arange(problem.slots)[None, None]
    at = problem.lengths[:, None, None] - problem.new + np.arange(problem.new)[None, :, None]
    seen = slot <= at
    return seen if problem.window is None else seen & (slot > at - problem.window)


# PyTorch --------------------------------------------------------------------------------------------------------------


def module(name: str) -> Any:
    """An optional package."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension that does not load says so in many ways
        raise NotThere(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def torch_for(problem: Problem) -> Any:
    """PyTorch, where it can help."""
    torch = module("torch")
    problem.need(problem.on_device and torch.cuda.is_available(), "PyTorch sees no GPU")
    problem.need(problem.plain, "16 bits only")
    return torch


def tensors(torch: Any, request: Request) -> tuple[Any, Any, Any]:
    """Query [B, T, N, H], and keys and values as kvattn has them, in the same memory."""
    arrays = (request.query, request.view.keys["data"], request.view.values["data"])
    query, keys, values = (torch.from_dlpack(x) for x in jax.block_until_ready(arrays))
    return (query, keys, values) if request.view.page_table is not None else (query, keys[0], values[0])


def sdpa(backend: str) -> Callable[[Problem], Program]:
    """`torch.nn.functional.scaled_dot_product_attention` on [B, K, S, H]."""

    def make(problem: Problem) -> Program:
        torch = torch_for(problem)
        attention = module("torch.nn.attention")
        problem.need(not problem.paged, "no pages")
        mask = None if problem.full else torch.from_numpy(reachable(problem)).cuda()[:, None]
        problem.need(mask is None or backend != "FLASH_ATTENTION", "its flash kernel takes no mask")
        kind = getattr(attention.SDPBackend, backend)
        gqa = problem.request.query.shape[2] != problem.request.view.num_kv_heads

        def run(copy):
            query, keys, values = copy
            with attention.sdpa_kernel(kind), torch.no_grad():
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=problem.request.scale, enable_gqa=gqa
                )
            return out.transpose(1, 2)

        copies = [tensors(torch, r) for r in problem.requests]
        return Program(run, [(q.transpose(1, 2), k, v) for q, k, v in copies], True, "[B, K, S, H]")

    return make


def flex(problem: Problem) -> Program:
    """FlexAttention, compiled, on [B, K, S, H]."""
    torch = torch_for(problem)
    problem.need(not problem.paged, "pages need a table of blocks of its own")
    flex_attention = module("torch.nn.attention.flex_attention")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention.flex_attention, dynamic=False)
    block_mask, window, new = None, problem.window, problem.new
    if not problem.full:
        lengths = torch.from_numpy(problem.lengths.astype(np.int32)).cuda()

        def seen(b, h, q, kv):
            at = lengths[b] - new + q
            return (kv <= at) if window is None else (kv <= at) & (kv > at - window)

        block_mask = flex_attention.create_block_mask(
            seen, len(problem.lengths), None, new, problem.slots, device="cuda"
        )
    gqa = problem.request.query.shape[2] != problem.request.view.num_kv_heads

    def run(copy):
        query, keys, values = copy
        with torch.no_grad():
            out = compiled(
                query, keys, values, block_mask=block_mask, scale=problem.request.scale, enable_gqa=gqa
            )  # fmt: skip
        return out.transpose(1, 2)

    copies = [tensors(torch, r) for r in problem.requests]
    return Program(run, [(q.transpose(1, 2).contiguous(), k, v) for q, k, v in copies], True, "[B, K, S, H]")


def pages(problem: Problem, torch: Any) -> tuple[list[Any], Any, int]:
    """For FlashInfer: (query, keys, values) with pages [P, K, R, H] per copy, the table [B, W], R."""
    if problem.paged:
        table = torch.from_numpy(np.asarray(problem.request.view.page_table)).cuda()
        copies = [
            (q, *(x.transpose(0, 1).contiguous() for x in kv))
            for q, *kv in (tensors(torch, r) for r in problem.requests)
        ]
        return copies, table.int(), problem.request.view.page_size
    problem.need(problem.slots % FLASHINFER_PAGE == 0, f"{problem.slots} slots are no whole pages of {FLASHINFER_PAGE}")
    batch, width = len(problem.lengths), problem.slots // FLASHINFER_PAGE

    def cut(x):
        _, heads, _, size = x.shape
        x = x.reshape(batch, heads, width, FLASHINFER_PAGE, size).transpose(1, 2)
        return x.reshape(batch * width, heads, FLASHINFER_PAGE, size).contiguous()

    table = torch.arange(batch * width, dtype=torch.int32, device="cuda").reshape(batch, width)
    copies = [(q, *(cut(x) for x in kv)) for q, *kv in (tensors(torch, r) for r in problem.requests)]
    return copies, table, FLASHINFER_PAGE


def flashinfer_wrapper(tensor_cores: bool) -> Callable[[Problem], Program]:
    """FlashInfer's batch decode; its plan, made on the host, is not timed."""

    def make(problem: Problem) -> Program:
        torch, flashinfer = torch_for(problem), module("flashinfer")
        problem.need(problem.new == 1, "one new token only")
        copies, table, size = pages(problem, torch)
        query, keys, _ = copies[0]
        counts = -(-problem.lengths // size)
        table = table.cpu()
        indices = torch.cat([table[b, : int(n)] for b, n in enumerate(counts)]).int().cuda()
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)).cuda()
        last = torch.from_numpy(((problem.lengths - 1) % size + 1).astype(np.int32)).cuda()
        workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        wrapper.plan(
            starts, indices, last, query.shape[2], keys.shape[1], query.shape[3], size,
            window_left=-1 if problem.window is None else problem.window - 1,
            q_data_type=query.dtype, kv_data_type=keys.dtype, sm_scale=problem.request.scale,
        )  # fmt: skip
        run = lambda copy: wrapper.run(copy[0], (copy[1], copy[2]))
        copies = [(q[:, 0].contiguous(), k, v) for q, k, v in copies]
        return Program(run, copies, True, f"pages of {size}, [P, K, R, H]; plan not timed")

    return make


def flashinfer_xqa(problem: Problem) -> Program:
    """TensorRT-LLM's XQA, out of FlashInfer."""
    torch, decode = torch_for(problem), module("flashinfer.decode")
    problem.need(hasattr(decode, "xqa_batch_decode_with_kv_cache"), "this FlashInfer has no XQA")
    call = decode.xqa_batch_decode_with_kv_cache
    problem.need(problem.new == 1, "one new token only")
    copies, table, size = pages(problem, torch)
    lengths = torch.from_numpy(problem.lengths.astype(np.int32)).cuda()
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")

    def run(copy):
        query, keys, values = copy
        return call(
            query, (keys, values), workspace, table, lengths, int(problem.lengths.max()),
            bmm1_scale=problem.request.scale, bmm2_scale=1.0,
            window_left=-1 if problem.window is None else problem.window - 1, kv_layout="HND",
        )  # fmt: skip

    copies = [(q[:, 0].contiguous(), k, v) for q, k, v in copies]
    return Program(run, copies, True, f"pages of {size}, [P, K, R, H]")


def fa3(problem: Problem) -> Program:
    """FlashAttention-3 on [B, S, K, H] or pages [P, R, K, H]; the kernel that plans its splits is timed with it."""
    torch = torch_for(problem)
    call = fa3_extension(torch, problem.fa3) if problem.fa3 else fa3_package()
    lengths = torch.from_numpy(problem.lengths.astype(np.int32)).cuda()
    table = None
    if problem.paged:
        table = torch.from_numpy(np.asarray(problem.request.view.page_table)).int().cuda()
    window = (-1, -1) if problem.window is None else (problem.window - 1, 0)
    lay = (
        (lambda x: x.permute(1, 2, 0, 3).contiguous()) if problem.paged else (lambda x: x.transpose(1, 2).contiguous())
    )
    copies = [(q, lay(k), lay(v)) for q, k, v in (tensors(torch, r) for r in problem.requests)]

    def run(copy):
        with torch.no_grad():
            return call(*copy, lengths, table, problem.slots, problem.request.scale, window)

    return Program(run, copies, True, "pages, [P, R, K, H]" if problem.paged else "[B, S, K, H]")


def fa3_package() -> Callable:
    """The package that flash-attention's hopper folder installs."""
    package = module("flash_attn_interface")

    def call(query, keys, values, lengths, table, slots, scale, window):
        del slots
        return package.flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=lengths, page_table=table, softmax_scale=scale, causal=True,
            window_size=window,
        )  # fmt: skip

    return call


@functools.cache
def fa3_operator(torch: Any, path: str) -> Any:
    """The operator that vLLM's extension registers."""
    try:
        torch.ops.load_library(path)
        return torch.ops._vllm_fa3_C.fwd.default
    except Exception as error:
        raise NotThere(f"{path}: {error}".splitlines()[0]) from error


def fa3_extension(torch: Any, path: str) -> Callable:
    """vLLM's build of FA3. Its arguments are filled in by the names of its schema, which differ between versions."""
    operator = fa3_operator(torch, path)

    def call(query, keys, values, lengths, table, slots, scale, window):
        given = {
            "q": query, "k": keys, "v": values, "seqused_k": lengths, "max_seqlen_q": query.shape[1],
            "max_seqlen_k": slots, "page_table": table, "block_table": table, "softmax_scale": scale,
            "is_causal": True, "causal": True, "cp_world_size": 1,
            "window_size_left": window[0], "window_size_right": window[1],
        }  # fmt: skip
        neutral = {"int": 0, "float": 0.0, "bool": False}
        arguments = {}
        for argument in operator._schema.arguments:
            if argument.name in given:
                arguments[argument.name] = given[argument.name]
            elif not argument.has_default_value():
                arguments[argument.name] = neutral.get(str(argument.type))
        return operator(**arguments)[0]

    return call


PEERS: dict[str, Callable[[Problem], Program]] = {
    "kvattn xla": kvattn_with("xla"),
    "einsum": einsums,
    "jax.nn xla": jax_nn("xla"),
    "jax.nn cudnn": jax_nn("cudnn"),
    "JAX Triton": jax_ops,
    "SDPA flash": sdpa("FLASH_ATTENTION"),
    "SDPA cudnn": sdpa("CUDNN_ATTENTION"),
    "SDPA efficient": sdpa("EFFICIENT_ATTENTION"),
    "FlexAttention": flex,
    "FlashInfer": flashinfer_wrapper(False),
    "FlashInfer tc": flashinfer_wrapper(True),
    "FlashInfer XQA": flashinfer_xqa,
    "FA3": fa3,
}
"""By name, as `gpu_cases.ALL_PEERS` has them."""


@contextlib.contextmanager
def freed(problem: Problem):
    """Gives PyTorch's memory back afterwards."""
    try:
        yield
    finally:
        if problem.on_device:
            with contextlib.suppress(NotThere):
                torch = module("torch")
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
