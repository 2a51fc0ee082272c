"""Where the random numbers of a sample come from, so that a recorded trace can be replayed."""

import torch

import device


class RandomDraws:
    """Fresh draws from one seed. The stream is PyTorch's own: images differ from margo's for the same seed."""

    def __init__(self, seed):
        self.generator = device.generator(seed)

    def orders(self, images, tokens):
        """Generation orders, [images, tokens] int64."""
        return torch.stack([torch.randperm(tokens, generator=self.generator) for _ in range(images)])

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def initial(self, iteration, *shape):
        """Noise that the reverse process of an iteration starts from, [rows, channels]; of a DiT's images [n, C, h, w]."""
        return self.normal(*shape)

    def step(self, iteration, step, *shape):
        """Noise of one reverse step; step counts up from 0 in the order taken."""
        return self.normal(*shape)

    def steps(self, iteration, count, rows, channels):
        """Noise of all reverse steps of an iteration at once, [count, rows, channels]."""
        return self.normal(count, rows, channels)


class TraceDraws(RandomDraws):
    """The draws recorded in a trace of the authors' code (a mapping of tensors, keys `orders`, `iter0.init_noise`, ...)."""

    def __init__(self, trace):
        super().__init__(0)
        self.trace = trace

    def orders(self, images, tokens):
        return self.trace["orders"].clone()

    def initial(self, iteration, *shape):
        return self.trace[f"iter{iteration}.init_noise"].clone()

    def step(self, iteration, step, *shape):
        return self.trace[f"iter{iteration}.step_noise"][step].clone()

    def steps(self, iteration, count, rows, channels):
        # With guidance the trace holds noise for both halves; that of the second never reaches a kept result.
        return self.trace[f"iter{iteration}.step_noise"][:, :rows].clone()


class JointTraceDraws(RandomDraws):
    """The draws of a DiT's trace: `z` and `step_noise`, both halves of a guided batch."""

    def __init__(self, trace):
        super().__init__(0)
        self.trace = trace

    def initial(self, iteration, *shape):
        return self.trace["z"][: shape[0]].clone()

    def step(self, iteration, step, *shape):
        return self.trace["step_noise"][step][: shape[0]].clone()
