"""The decoding loop: one step, and the memory that every step reads and writes.

A step takes the newest token of each sequence through the model, samples the next one and writes it down. It reads no
number on the host, and its tensors never move: where a sequence stands, which column of noise is due and where the
token goes are tensors on the device, which the step itself counts on. So on a GPU it is captured once as a CUDA graph
and replayed R-1 times without a word from the host, which takes longer to ask for a step's 300 kernels than the GPU
takes to run them. On a CPU the same function runs as it is.

A graph holds addresses, not numbers: the optimizer rewrites the weights in place, and the next replay reads the new
ones. It is captured again only when the weights have moved, or for another batch size.

With one post's numbers: docs/walk.md, station 5.
"""

from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels import decode_attention, linear_fp32, sample_head
from kernels.decode_attention import by_bags
from nanorlhf.attention import Attend, causal
from nanorlhf.models import Policy
from nanorlhf.packing import Packed, pack, split_by_tokens, to_device

# Tokens a forward pass of the prefill. An H200 needs 20 ms for 4,096 tokens of a 1B model, and the host as long to ask
# for their 300 kernels: so four times as many. On a CPU no activation of the tiny model may reach 32 MB here, from
# where on glibc asks the system for every tensor's memory, zeroed page by page: with 16,384 a rollout took 12% longer
# on one thread of an Intel Xeon (model 167). In learning fewer, larger passes pay all the same (train_sft.py).
PREFILL_TOKENS = {"cuda": 16384, "cpu": 4096}
# S is a multiple of it. The GPU's kernel never reads a slot that is empty, and with fewer sizes fewer graphs are
# captured; on a CPU every slot is read.
ROUND_SLOTS = {"cuda": 64, "cpu": 8}
WARM_UPS = 3  # steps before a capture: kernels are compiled and libraries set up outside of it, as torch asks
KEPT = 2  # decoders a policy: the rollout's, and the smaller one of the samples for the diversity metrics


class KVCache:
    """Keys and values of B sequences of different lengths: (L, B, Hkv, S, Dh) each, token j of a sequence in slot j.

    What one head of one sequence has is one stretch of memory, as attention on a CPU reads it; there, keys lie in it
    coordinate by coordinate where that is read sooner. Llama-3.2-1B in bf16: 32,768 bytes a slot, 2.4 GB for 128
    sequences of 576.
    """

    def __init__(self, policy: Policy, batch: int, slots: int):
        config, weight = policy.config, policy.head_weight
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch, heads, slots, config.head_dim)
        turned = (layers, batch, heads, config.head_dim, slots)
        self.keys = weight.new_empty(turned).mT if by_bags(weight) else weight.new_empty(shape)
        self.values = weight.new_empty(shape)
        self.every = torch.arange(batch, device=weight.device)  # (B,) the sequences

    def clear(self) -> None:
        """No slot holds what an earlier batch left there: behind a mask too, nan times 0 is nan."""
        self.keys.zero_()
        self.values.zero_()

    def _store(self, layer: int, sequences: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """sequences, positions (n,): where k and v (n, Hkv, Dh) belong."""
        self.keys[layer][sequences, :, positions] = k
        self.values[layer][sequences, :, positions] = v

    def _slots(self, layer: int, sequences: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of these sequences, (B, S, Hkv, Dh) each."""
        return self.keys[layer, sequences].transpose(1, 2), self.values[layer, sequences].transpose(1, 2)

    def prefill(self, packed: Packed, first: int) -> Attend:
        """Ordinary causal attention that leaves k and v in the cache, of sequences `first`, first + 1, ...; where only
        their last tokens are read, it is a decoding step for these."""
        n = sum(packed.lengths)  # tokens without the filling
        lengths = torch.tensor(packed.lengths)
        these = slice(first, first + len(lengths))
        sequences = self.every[these].repeat_interleave(to_device(lengths, self.every.device), output_size=n)  # (n,)
        attend = causal(packed)

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor, read: Tensor | None) -> Tensor:
            self._store(layer, sequences, packed.positions[:n], k[:n], v[:n])
            if read is None:
                return attend(layer, q, k, v, None)
            return decode_attention(q[read], *self._slots(layer, these), packed.positions[read])

        return store_and_attend

    def decode(self, positions: Tensor) -> Attend:
        """Attention of one new token a sequence at `positions` (B,): it sees its own sequence, itself included."""

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor, read: None) -> Tensor:
            self._store(layer, self.every, positions, k, v)  # k, v (B, Hkv, Dh)
            return decode_attention(q, *self._slots(layer, slice(None)), positions)  # q (B, H, Dh)

        return store_and_attend


def greedy(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token and its log-prob at temperature 1. (B, D), (V, D) -> (B,) int64, (B,) fp32."""
    logp = torch.log_softmax(linear_fp32(hidden, head_weight), dim=-1)  # (B, V)
    tokens = logp.argmax(dim=-1)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


class Decoder:
    """Decodes R tokens for each of B queries, in memory that is allocated once and used again.

    It keeps nothing of a policy but addresses, so that a policy can be forgotten while its decoder is.
    """

    def __init__(self, policy: Policy, batch: int, slots: int, response_length: int, temperature: float):
        weight = policy.head_weight
        self.device, self.temperature = weight.device, temperature
        self.cache = KVCache(policy, batch, slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        self.tokens, self.positions = zeros(batch), zeros(batch)  # the newest of each sequence, and where it stands
        self.t = zeros(1)  # which token of the responses is next
        self.noise = zeros(batch, response_length, dtype=torch.float64)
        self.responses = zeros(batch, response_length)
        self.logprobs = zeros(batch, response_length, dtype=torch.float32)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.addresses: list[int] = []  # of the weights that the graph reads

    @torch.no_grad()
    def decode(
        self, policy: Policy, queries: list[list[int]], noise: Tensor, use_graph: bool = True
    ) -> tuple[Tensor, Tensor]:
        """args: B queries; noise (B, R) float64 in [0, 1); use_graph=False: step by step on a GPU too, for tests
        -> responses (B, R) int64, logprobs (B, R) fp32; new tensors
        """
        step = partial(self.step, policy)
        if use_graph and self.device.type == "cuda" and self.responses.shape[1] > 1:
            step = self.captured(policy).replay
        self.cache.clear()
        self.noise.copy_(to_device(noise, self.device))
        self.t.zero_()
        self.write(policy, self.prefill(policy, queries))
        for _ in range(self.responses.shape[1] - 1):
            step()
        return self.responses.clone(), self.logprobs.clone()

    def prefill(self, policy: Policy, queries: list[list[int]]) -> Tensor:
        """All queries through the model, into the cache. -> hidden states of their last tokens (B, D)"""
        lengths = [len(query) for query in queries]
        hidden = []
        for group in split_by_tokens(lengths, PREFILL_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]):
            packed = pack([queries[i] for i in group], device=self.device)
            attend = self.cache.prefill(packed, first=group[0])
            hidden.append(policy.model(packed.tokens, packed.positions, attend, packed.last_rows()))
        self.positions.copy_(to_device(torch.tensor(lengths), self.device))  # of the first response token
        return torch.cat(hidden)

    def step(self, policy: Policy) -> None:
        """Read the newest token of each sequence, sample the next. All of it on the device."""
        hidden = policy.model(self.tokens, self.positions, self.cache.decode(self.positions))  # (B, D)
        self.positions += 1
        self.write(policy, hidden)

    def write(self, policy: Policy, hidden: Tensor) -> None:
        """Sample token t from hidden states (B, D), and write it and its log-prob down in column t."""
        if self.temperature > 0:
            tokens, logprobs = sample_head(hidden, policy.head_weight, self.noise, self.t, self.temperature)
        else:
            tokens, logprobs = greedy(hidden, policy.head_weight)
        self.tokens.copy_(tokens)
        self.responses.index_copy_(1, self.t, tokens[:, None])
        self.logprobs.index_copy_(1, self.t, logprobs[:, None])
        self.t += 1

    def captured(self, policy: Policy) -> torch.cuda.CUDAGraph:
        """The graph of a step, captured when there is none for these weights. What the buffers hold is lost."""
        addresses = [parameter.data_ptr() for parameter in policy.parameters()]
        if self.graph is not None and addresses == self.addresses:
            return self.graph
        self.graph = None  # gives its memory back before the next one takes its own
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.t.zero_()  # a response of two tokens has no column for three steps
                    self.positions.zero_()
                    self.step(policy)
                self.t.zero_()
                self.positions.zero_()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(policy)
        self.graph, self.addresses = graph, addresses
        return graph


_kept: WeakKeyDictionary[Policy, dict[tuple, Decoder]] = WeakKeyDictionary()  # the one used last stands last


def decoder_for(policy: Policy, batch: int, longest: int, response_length: int, temperature: float) -> Decoder:
    """A decoder of B sequences with queries of up to `longest` tokens: the one that was used for this size before, or a
    new one. The size is the batch's own, so what was decoded earlier does not change a bit of the result.

    It stays when learning begins: 2.4 GB at Llama-3.2-1B's size, where giving it back would mean a new graph an update,
    because a graph holds the addresses of its cache.
    """
    weight = policy.head_weight
    multiple = ROUND_SLOTS["cuda" if weight.is_cuda else "cpu"]
    slots = -(-(longest + response_length) // multiple) * multiple
    size = batch, slots, response_length, temperature
    kept = _kept.setdefault(policy, {})
    decoder = kept.pop((weight.device, weight.dtype, *size), None)
    if decoder is None:
        while len(kept) >= KEPT:  # before the new one takes its memory
            del kept[next(iter(kept))]
        decoder = Decoder(policy, *size)
    kept[weight.device, weight.dtype, *size] = decoder
    return decoder
