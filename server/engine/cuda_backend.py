"""The backend in Triton kernels, for NVIDIA GPUs. Not yet run on a GPU.

A step uploads one buffer of lists, and launches ten kernels for each layer, and two more for each group of modules
if tokens have adapters. It waits for the device once, for the chosen tokens; twice if all rows need torch's
sampling (top-p and the like, or log-probabilities), and three times if only some do. Steps that draw a token after
each of their tokens are replayed as CUDA graphs; other steps launch the same kernels one by one. The torch backend
is its test oracle.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from server.engine.backend import Backend, StepAdapters
from server.engine.cuda_graphs import Capture, Graphs, GraphSizes, Outputs
from server.engine.cuda_step import Buffers, Lora, Step, StepLists, draws_of, step_of
from server.engine.sampling import LogitsRow, Sampled, sample
from server.engine.sequence import Chunk
from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights
from server.model.cuda.lora import TILE
from server.model.cuda.variants import Variant, launch, variants
from server.model.cuda.work import lora_work
from server.model.device import to_device
from server.model.ops.norms import rotary_table
from server.model.rank_rows import RowFormat

Launch = Callable[[Variant, tuple[int, ...], Seq[torch.Tensor]], None]
_MAX_SHORT = 32
"""Steps of more tokens use the tall form of products, which reads weights less often and has the same bits."""
_MAX_PROGRAMS = 1024
"""Programs of a kernel over a list of work; each may take several items."""
_ITEMS_AT_ONCE = 16
"""Programs for each token over the items of adapters: three modules of rank 64 have 12 items."""
_PLACERS = 8
"""Programs that copy a list."""

log = logging.getLogger(__name__)


class CudaBackend(Backend):
    """A backend that computes with the kernels of `server.model.cuda`."""

    name = "cuda"
    is_batch_invariant = True

    def __init__(
        self,
        config: ModelConfig,
        weights: BaseWeights,
        *,
        max_positions: int,
        max_num_seqs: int = 256,
        launch: Launch = launch,
        capture: Capture | None = None,
    ) -> None:
        """`launch` runs a kernel, and `capture` makes CUDA graphs (None: no graphs). Tests give other ones."""
        dtype, device = weights.embed.dtype, weights.embed.device
        super().__init__(config, RowFormat(dtype, dtype), dtype, device)
        self._weights = weights
        self._launch = launch
        self._capture = capture
        self._max_positions, self._max_num_seqs = max_positions, max_num_seqs
        self._cos, self._sin = rotary_table(max_positions, config.head_dim, config.rope_theta).to(weights.embed)
        self._variants: dict[str, Variant] = {}
        self._buffers = Buffers(dtype, device)
        self._counts: dict[int, torch.Tensor] = {}  # numbers of rows, on the device
        self._adapters: StepAdapters[Lora | None] = StepAdapters(
            lambda runs: lora_work(runs, self.rows.layouts) if runs else None
        )
        self.graphs: Graphs | None = None

    def allocate(self, num_blocks: int, block_size: int, max_rank: int) -> None:
        super().allocate(num_blocks, block_size, max_rank)
        self._variants = variants(self.config, block_size)
        sizes = GraphSizes.fitting(
            self.config, self._dtype.itemsize, self._max_num_seqs, self._max_positions, block_size
        )
        if self._capture is None or sizes is None:
            return
        self._use_device()
        try:
            with torch.inference_mode():
                self.graphs = Graphs(sizes, self._dtype, self._device, self._compute, self._capture)
        except Exception as error:
            log.exception("no CUDA graphs, so the host launches each kernel")
            self.fallbacks.append(f"no CUDA graphs ({type(error).__name__}): see the log")

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        self._use_device()
        return self._hidden(step_of(self._lists((*decodes, *prefills), ()), self._buffers))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._use_device()
        num = len(hidden)
        found = torch.empty(num, self.config.vocab_size, dtype=torch.float32, device=self._device)
        if num:
            if num not in self._counts:
                self._counts[num] = to_device(torch.tensor([num], dtype=torch.int32), self._device)
            self._linear("head", self._counts[num], num, hidden.contiguous(), self._weights.lm_head, found)
        return found

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        draws = to_device(torch.from_numpy(draws_of(rows)), self._device)
        return self._choose(*self._outputs(hidden, draws), rows)

    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        self._use_device()
        lists = self._lists((*decodes, *prefills), rows)
        outputs = None if self.graphs is None else self.graphs.run(lists)
        if outputs is None:
            step = step_of(lists, self._buffers)
            outputs = self._outputs(self._hidden(step), step.lists["draws"])
        return self._choose(*outputs, rows)

    def _lists(self, chunks: Seq[Chunk], rows: Seq[LogitsRow]) -> StepLists:
        group = self.config.num_heads // self.config.num_kv_heads
        return StepLists.of(chunks, rows, self._adapters.of(chunks), self.cache.block_size, group)

    def _compute(self, packed: torch.Tensor, lists: torch.Tensor, num_lists: int, step: Step) -> Outputs:
        """Launch a whole step that a graph can repeat: nothing is allocated, uploaded or waited for."""
        num, buffers, weights = step.num_tokens, step.buffers, self._weights
        self._launch(self._variants["place_lists"], (_PLACERS, num_lists), (packed, lists))
        stream = self._forward(step)
        hidden = buffers.get("x", num, self.config.hidden_size)
        self._norm(stream, weights.final_norm, hidden)
        logits = buffers.get("logits", num, self.config.vocab_size, dtype=torch.float32)
        self._linear("head", step.lists["num_tokens"], num, hidden, weights.lm_head, logits)
        tokens = buffers.get("tokens", num, dtype=torch.int32)
        self._launch(self._variants["gumbel_argmax"], (num,), (logits, step.lists["draws"], tokens))
        return logits, tokens

    def _hidden(self, step: Step) -> torch.Tensor:
        last = self._forward(step).index_select(0, step.lists["needed"])
        found = torch.empty_like(last)
        if len(last):
            self._norm(last, self._weights.final_norm, found)
        return found

    def _forward(self, step: Step) -> torch.Tensor:
        """Compute all layers, and return the residual stream (tokens, hidden)."""
        config, weights, num, lists = self.config, self._weights, step.num_tokens, step.lists
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        get = step.buffers.get
        stream, x = (get(name, num, config.hidden_size) for name in ("stream", "x"))
        qkv = get("qkv", num, heads + 2 * kv_heads, dim)
        q, attended = (get(name, num, heads, dim) for name in ("q", "attended"))
        part_out = get("part_out", step.num_parts, heads, dim, dtype=torch.float32)
        part_lse = get("part_lse", step.num_parts, heads, dtype=torch.float32)
        gate_up = get("gate_up", num, 2 * config.intermediate_size)
        inner = get("inner", num, config.intermediate_size)
        swiglu = self._variants["swiglu"]
        tiles = -(-config.intermediate_size // int(swiglu.constants["BLOCK"]))
        num_programs = min(step.num_works, _MAX_PROGRAMS)
        torch.index_select(weights.embed, 0, lists["token_ids"], out=stream)
        for index, layer in enumerate(weights.layers):
            k_cache, v_cache = self.cache.k[index], self.cache.v[index]
            self._norm(stream, layer.input_norm, x)
            self._product("qkv", step, index, x, layer.qkv, qkv.view(num, -1))
            rotary = "rotary_write, not rotated" if index in config.nope_layers else "rotary_write"
            tensors = (qkv, self._cos, self._sin, lists["positions"], lists["slots"], q, k_cache, v_cache)
            self._launch(self._variants[rotary], (num, heads + 2 * kv_heads), tensors)
            work = (lists["tables"], lists["works"], lists["num_works"], part_out, part_lse)
            self._launch(self._variants["attention_split"], (num_programs, kv_heads), (q, k_cache, v_cache, *work))
            combined = (part_out, part_lse, lists["parts"], attended)
            self._launch(self._variants["attention_combine"], (num, heads), combined)
            self._product("o", step, index, attended.view(num, -1), layer.o, stream)
            self._norm(stream, layer.post_norm, x)
            self._product("gate_up", step, index, x, layer.gate_up, gate_up)
            self._launch(swiglu, (num, tiles), (gate_up, inner))
            self._product("down", step, index, inner, layer.down, stream)
        return stream

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        self._launch(self._variants["rms_norm"], (len(x),), (x, weight, y))

    def _product(
        self, name: str, step: Step, layer: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Write a group's product with the adapters' to y, or add it to y if y is the residual stream."""
        lists = step.lists
        self._linear(name, lists["num_tokens"], step.num_tokens, x, weight, y)
        if not step.has_adapters or not step.num_items[name]:
            return
        items, a_rows, b_units = lists[f"items {name}"], self.rows.a[name][layer], self.rows.b[name][layer]
        hidden = step.buffers.get("lora", step.num_items[name], TILE, TILE)
        num_programs = min(step.num_items[name], _ITEMS_AT_ONCE * step.num_tokens, _MAX_PROGRAMS)
        shrink = (x, a_rows, items, lists[f"num_items {name}"], hidden)
        self._launch(self._variants[f"lora_shrink {name}"], (num_programs,), shrink)
        variant = self._variants[f"lora_expand {name}"]
        tiles = int(variant.constants["OUT"]) // int(variant.constants["BLOCK_N"])
        num_programs = min(min(len(lists["chunks"]), step.num_tokens) * tiles, _MAX_PROGRAMS)
        expand = (hidden, b_units, items, lists[f"ranges {name}"], lists["chunks"], lists["num_chunks"], y)
        self._launch(variant, (num_programs,), expand)

    def _linear(
        self, name: str, count: torch.Tensor, num: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
    ) -> None:
        height, rows = ("short", 16) if num <= _MAX_SHORT else ("tall", 64)
        variant = self._variants[f"linear {name}, {height}"]
        columns = int(variant.constants["N"]) // int(variant.constants["BLOCK_N"])
        self._launch(variant, (columns, -(-num // rows)), (x, weight, y, y, count))

    def _outputs(self, hidden: torch.Tensor, draws: torch.Tensor) -> Outputs:
        """Return the logits and the tokens that the kernel draws, which `_choose` uses for plain rows."""
        logits = self.logits(hidden)
        tokens = torch.empty(len(logits), dtype=torch.int32, device=self._device)
        if len(logits):
            self._launch(self._variants["gumbel_argmax"], (len(logits),), (logits, draws, tokens))
        return logits, tokens

    def _choose(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        """Return the kernel's tokens, or torch's for rows that need more than a temperature.

        Which of the two draws depends only on the row, so its token doesn't depend on other rows.
        """
        plain = [_is_plain(row) for row in rows]
        others = [i for i, is_plain in enumerate(plain) if not is_plain]
        found: dict[int, Sampled] = {}
        if others:
            index = to_device(torch.tensor(others), self._device)
            found |= zip(others, sample(logits[index], [rows[i] for i in others]), strict=True)
        token_ids = tokens.tolist() if len(others) < len(rows) else [-1] * len(rows)
        return [
            Sampled(token_id if token_id >= 0 else None, None) if is_plain else found[i]
            for i, (token_id, is_plain) in enumerate(zip(token_ids, plain, strict=True))
        ]

    def _use_device(self) -> None:
        """Make Triton launch on the weights' GPU in this thread."""
        if self._device.index is not None:
            torch.cuda.set_device(self._device)


def _is_plain(row: LogitsRow) -> bool:
    """Return whether a row's token depends only on its logits, temperature and noise."""
    params = row.params
    return not (
        params.changes_logits
        or params.logprobs
        or params.top_k
        or params.min_p
        or params.top_p < 1
        or row.forbidden is not None
    )
