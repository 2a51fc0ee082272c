"""Mode "eager": the authors' sampling algorithm, operation for operation, as their code runs it.

Nothing is hoisted or shared: guidance doubles the batch in every part, the time embedding is evaluated for every row
and the condition projected at every step, schedule tables become tensors at every step, the decoder runs on all
tokens. bf16 is torch.autocast over float32 parameters, as the authors' evaluation on CUDA (there float16 by default); the
parameters keep requires_grad, or autocast would cast the weights anew at every call.
"""

import contextlib
import math

import numpy as np
import torch

import device
from schedule import Diffusion


def from_table(table, t, shape):
    """Values of a float64 table at the timesteps t, as float32 broadcast to a shape."""
    values = torch.from_numpy(table).to(t.device)[t].float()
    return values[:, None].expand(shape) + torch.zeros(shape)


def reverse_step(diffusion, model, x, t, noise, temperature):
    """One ancestral step with learned variance: x [R, C] at respaced step t [R] -> x at the step before."""
    channels = x.shape[1]
    timesteps = torch.tensor(diffusion.timestep_map, dtype=t.dtype)[t]
    eps, v = torch.split(model(x, timesteps), channels, dim=1)
    low = from_table(diffusion.posterior_log_variance_clipped, t, x.shape)
    high = from_table(np.log(diffusion.betas), t, x.shape)
    frac = (v + 1) / 2
    log_variance = frac * high + (1 - frac) * low
    torch.exp(log_variance)  # the authors' code returns the variance too
    x0 = (from_table(diffusion.sqrt_recip_alphas_cumprod, t, x.shape) * x
          - from_table(diffusion.sqrt_recipm1_alphas_cumprod, t, x.shape) * eps)
    mean = (from_table(diffusion.posterior_mean_coef1, t, x.shape) * x0
            + from_table(diffusion.posterior_mean_coef2, t, x.shape) * x)
    from_table(diffusion.posterior_variance, t, x.shape)
    from_table(diffusion.posterior_log_variance_clipped, t, x.shape)
    nonzero = (t != 0).float().view(-1, 1)
    return mean + nonzero * torch.exp(0.5 * log_variance) * noise * temperature


class Eager:
    """A model that runs in float32, or under autocast if dtype is bfloat16."""

    def __init__(self, model, dtype):
        self.model = model.requires_grad_(True)
        self.dtype = dtype

    def context(self):
        """What a run happens in."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        if self.dtype == torch.bfloat16:
            stack.enter_context(torch.autocast(device.kind(), torch.bfloat16))
        return stack

    def prepare(self, request):
        """Has autocast cast every weight once, which the authors' run pays in its first iteration. Inside context()."""
        if self.dtype == torch.bfloat16:
            for m in self.model.modules():
                if isinstance(m, torch.nn.Linear):
                    m(torch.zeros(1, m.in_features))


class EagerSampler(Eager):
    """Samples with a model.MAR."""

    def head(self, z, iteration, scale, guided, request, draws):
        """Tokens for the rows of z [R, D], R = 2n with guidance: the whole reverse process."""
        net, channels = self.model.diffloss.net, self.model.channels
        rows = len(z) // 2 if guided else len(z)
        x = draws.initial(iteration, rows, channels)
        if guided:
            x = torch.cat([x, x], dim=0)

        def model(x, t):
            return net.forward_with_cfg(x, t, z, scale) if guided else net(x, t, z)

        diffusion = request.diffusion
        for i in range(diffusion.steps):
            t = torch.tensor([diffusion.steps - 1 - i] * len(x))
            noise = draws.step(iteration, i, *x.shape)
            x = reverse_step(diffusion, model, x, t, noise, request.temperature)
        return x

    def sample(self, request, draws, clock):
        """Tokens [N, L, C]. Iterations outside request.subset are not run: their tokens become unit normal noise."""
        mar, n, length, iters = self.model, request.batch, self.model.seq_len, request.iters
        guided = request.cfg != 1.0
        mask = torch.ones(n, length)
        tokens = torch.zeros(n, length, mar.channels)
        orders = draws.orders(n, length)
        labels = None if request.labels is None else torch.tensor(request.labels)
        for step in range(iters):
            run = step in request.subset
            started = device.now()
            cur_tokens = tokens.clone()
            embedding = mar.fake_latent.repeat(n, 1) if labels is None else mar.class_emb(labels)
            if guided:
                tokens = torch.cat([tokens, tokens], dim=0)
                embedding = torch.cat([embedding, mar.fake_latent.repeat(n, 1)], dim=0)
                mask = torch.cat([mask, mask], dim=0)
            encoder_started = device.now()
            x = mar.encode(tokens, mask, embedding) if run else None
            decoder_started = device.now()
            z = mar.decode(x, mask) if run else None
            decoder_ended = device.now()

            masked = torch.tensor([math.floor(length * np.cos(math.pi / 2 * (step + 1) / iters))], dtype=torch.float32)
            masked = torch.maximum(torch.ones(1), torch.minimum(torch.sum(mask, dim=-1, keepdim=True) - 1, masked))[0]
            following = torch.scatter(torch.zeros(n, length), -1, orders[:, : masked.long()], torch.ones(n, length)).bool()
            to_predict = mask[:n].bool() if step >= iters - 1 else torch.logical_xor(mask[:n].bool(), following)
            mask = following.float()
            if not run:
                cur_tokens[to_predict] = draws.normal(int(to_predict.sum()), mar.channels)
                tokens = cur_tokens
                continue

            z = z[(torch.cat([to_predict, to_predict], dim=0) if guided else to_predict).nonzero(as_tuple=True)]
            scale = 1 + (request.cfg - 1) * (length - masked) / length if request.cfg_schedule == "linear" else request.cfg
            head_started = device.now()
            sampled = self.head(z, step, scale, guided, request, draws)
            head_ended = device.now()
            if guided:
                sampled, _ = sampled.chunk(2, dim=0)
            cur_tokens[to_predict.nonzero(as_tuple=True)] = sampled
            tokens = cur_tokens.clone()
            clock.iteration(step, enc=decoder_started - encoder_started, dec=decoder_ended - decoder_started,
                            head=head_ended - head_started, total=device.now() - started, rows=len(z))
        return tokens
