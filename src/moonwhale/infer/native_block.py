"""A block of `Decoder` for few tokens on a CPU: its settings and weights as `step/` reads them, and the call."""

from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.infer.feed_forward import Experts, Network
from moonwhale.native import bindings


class NativeBlock:
    """`decoder._Block` once more, on the same weights, with a residual stream in fp32."""

    def __init__(self, block):
        attention, feed_forward = block.attention, block.feed_forward
        self.layer = attention.layer
        self._alive = [attention, feed_forward]  # what addresses below lead to
        self._block = bindings.Block(
            hidden=len(block.before.weight),
            before=self._norm(block.before),
            after=self._norm(block.after),
            **self._of_attention(attention),
            **(self._of_experts(feed_forward) if isinstance(feed_forward, Experts) else self._of_network(feed_forward)),
        )

    def __call__(self, x: Tensor, cache: LatentCache, placement) -> Tensor:
        """x (B, Q, hidden) in any dtype, which may be written over; the result is fp32."""
        x = x.float().contiguous()
        keys, values, means = (tensors[self.layer] for tensors in (cache.keys, cache.values, cache.means))
        bindings.run_block(self._block, keys, values, means, placement.for_native, x)
        return x

    def _of_attention(self, a) -> dict:
        fields = {name: getattr(a, name) for name in ("heads", "nope", "rope", "rank", "interleaved", "size", "topk")}
        fields |= {"v": a.w_v.shape[-1], "scale": a.scale, "kv_norm": self._norm(a.kv_norm)}
        fields |= {"down": a.down.matrix, "up": self._as_it_is(a.up), "out": a.out.matrix}
        if a.q_up:
            fields |= {"q_norm": self._norm(a.q_norm), "q_up": a.q_up.matrix}
        if a.key_conv is not None:
            fields |= {"taps": a.key_conv.shape[-1], "conv": self._numbers(a.key_conv[:, 0].T)}
        return fields

    def _of_experts(self, experts: Experts) -> dict:
        gate, networks = experts.gate, [*experts.networks]
        if experts.shared:
            networks.append(experts.shared)
        return self._of_network(*networks) | {
            "experts": gate.n_experts,
            "chosen": gate.topk,
            "groups": gate.groups,
            "chosen_groups": gate.topk_groups,
            "sigmoid": gate.sigmoid,
            "normalise": gate.normalise,
            "factor": gate.factor,
            "shared": experts.shared is not None,
            "router": self._router(gate.weight),
            "bias": self._numbers(gate.e_score_correction_bias),
        }

    def _of_network(self, *networks: Network) -> dict:
        array = bindings.networks((network.up.matrix, network.down.matrix) for network in networks)
        self._alive.append(array)
        return {"networks": bindings.address(array)}

    def _as_it_is(self, weight: Tensor) -> bindings.Matrix:
        return bindings.Matrix(bindings.address(weight), None, None, *weight.shape, bindings.KINDS[weight.dtype])

    def _router(self, weight: Tensor) -> bindings.Matrix:
        self._alive.append(bindings.panels(weight.float()))
        return bindings.Matrix.of(self._alive[-1], len(weight))

    def _norm(self, norm) -> bindings.Norm:
        return bindings.Norm(self._numbers(norm.weight), norm.eps)

    def _numbers(self, tensor: Tensor) -> int:
        """The address of a copy in fp32."""
        self._alive.append(tensor.detach().float().contiguous())
        return self._alive[-1].data_ptr()
