"""Mode "tuned": the fastest MAR sampling that we know how to write in PyTorch, computing the same function.

What it does beyond the authors' code (README.md says why each is fair):
- Linear layers are oneDNN kernels with weights packed once, bias, GELU, SiLU and residual sums in the epilogue: the
  operators that torch.compile emits when it freezes a bf16 model, used here for float32 too, where MKL is slower.
- The plan of all iterations is made before the first; only visible tokens are embedded; guidance shares the tokens.
- The last decoder block computes queries, projection and MLP only for the tokens predicted in this iteration.
- Head: time embedding once per model, condition once per token, all modulations of a run of steps as one GEMM,
  one state x per token under guidance, all noise of an iteration drawn at once, schedule constants as numbers.
- bf16 means bf16 weights and activations, without autocast; the reverse process keeps x in float32.
"""

import torch
import torch.nn.functional as F

import device
from schedule import cfg_scale, masked_counts

# How much of the modulations is computed at a time: enough rows for an efficient GEMM, little enough to stay in the
# last-level cache and below malloc's threshold for fresh (page-faulting) memory. 4 to 32 MiB measure alike.
MODULATION_BYTES = 8 << 20
CUDA_MODULATION_BYTES = 256 << 20  # there is no cache to stay in, and large GEMMs are what a GPU wants


def onednn_packs(dtype):
    """oneDNN packs for CPUs only, and bf16 only where the CPU has instructions for it."""
    return device.kind() == "cpu" and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Packed:
    """A linear layer on oneDNN with its weight packed once: act(x W^T + b), or x W^T + b + other."""

    # The pack's layout depends on the row count it is asked for. One row would give a layout that suits only one
    # row; any larger count gives the same times for all counts, one row included.
    ROWS = 64

    def __new__(cls, weight, bias, dtype):
        return super().__new__(cls if onednn_packs(dtype) else Plain)

    def __init__(self, weight, bias, dtype):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), self.ROWS)
        self.bias = bias.detach().to(dtype)

    def __call__(self, x, act="none"):
        name, _, algorithm = act.partition("_")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], (algorithm or "none") if name == "gelu" else "")

    def add(self, x, other):
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")


class Plain(Packed):
    """The same where oneDNN does not pack: cuBLAS and ATen take weights as they are."""

    ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "swish": F.silu}

    def __init__(self, weight, bias, dtype):
        self.weight, self.bias = weight.detach().to(dtype).contiguous(), bias.detach().to(dtype)

    def __call__(self, x, act="none"):
        return self.ACTIVATIONS[act](F.linear(x, self.weight, self.bias))

    def add(self, x, other):
        return other + F.linear(x, self.weight, self.bias)


class Norm:
    """LayerNorm with affine parameters in the working dtype (statistics in float32, as ATen does)."""

    def __init__(self, ln, dtype):
        self.shape, self.eps = ln.normalized_shape, ln.eps
        self.weight = None if ln.weight is None else ln.weight.detach().to(dtype)
        self.bias = None if ln.bias is None else ln.bias.detach().to(dtype)

    def __call__(self, x):
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for [N, H, L, d]. ATen's fused CPU kernel is the faster one in float32; in bf16 the two
    products on oneDNN are, by a third at 320 tokens."""
    if q.dtype == torch.float32 or device.kind() == "cuda":
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v


class TunedBlock:
    """Transformer block. With rows, only those rows of every image leave it: [N, L, D] -> [N, rows, D]."""

    def __init__(self, block, dtype, last=False):
        attn, width = block.attn, block.attn.proj.in_features
        self.heads = attn.heads
        self.norm1, self.norm2 = Norm(block.norm1, dtype), Norm(block.norm2, dtype)
        w, b = attn.qkv.weight, attn.qkv.bias
        if last:
            self.q, self.kv = Packed(w[:width], b[:width], dtype), Packed(w[width:], b[width:], dtype)
        else:
            self.qkv = Packed(w, b, dtype)
        self.proj = Packed(attn.proj.weight, attn.proj.bias, dtype)
        self.fc1 = Packed(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype)
        self.fc2 = Packed(block.mlp.fc2.weight, block.mlp.fc2.bias, dtype)

    def split(self, x, parts):
        """[N, L, parts*D] -> parts views of [N, H, L, D/H]."""
        n, length, width = x.shape
        return x.view(n, length, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def __call__(self, x, rows=None):
        h = self.norm1(x)
        if rows is None:
            q, k, v = self.split(self.qkv(h), 3)
        else:
            index = rows.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            (q,) = self.split(self.q(h.gather(1, index)), 1)
            k, v = self.split(self.kv(h), 2)
            x = x.gather(1, index)
        a = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.proj.add(a, x)
        return self.fc2.add(self.fc1(self.norm2(x), "gelu"), x)


class TunedHead:
    """The denoising MLP with everything that does not depend on x taken out of the loop over timesteps."""

    def __init__(self, net, dtype):
        self.dtype, self.channels = dtype, net.channels
        self.width, self.depth = net.input_proj.out_features, len(net.res_blocks)
        self.time_embed = net.time_embed  # float32: run once per list of timesteps
        self.times, self.graphs = {}, {}
        self.cond = Packed(net.cond_embed.weight, net.cond_embed.bias, dtype)
        self.input = Packed(net.input_proj.weight, net.input_proj.bias, dtype)
        self.blocks = [(Norm(b.in_ln, dtype), Packed(b.mlp[0].weight, b.mlp[0].bias, dtype),
                        Packed(b.mlp[2].weight, b.mlp[2].bias, dtype)) for b in net.res_blocks]
        self.final_norm = Norm(net.final_layer.norm_final, dtype)
        self.final = Packed(net.final_layer.linear.weight, net.final_layer.linear.bias, dtype)
        # One linear layer for the modulations of all blocks: (shift, scale, gate) each, then (shift, scale) of the
        # final layer. The 1 of "1 + scale" goes into the bias.
        ada = [b.adaLN_modulation[1] for b in net.res_blocks] + [net.final_layer.adaLN_modulation[1]]
        bias = torch.cat([a.bias.detach() for a in ada]).clone()
        for i in range(self.depth + 1):
            bias[(3 * i + 1) * self.width : (3 * i + 2) * self.width] += 1
        self.ada = Packed(torch.cat([a.weight.detach() for a in ada]), bias, dtype)

    def time_table(self, diffusion):
        """Time embedding of every step in the order taken, [S, W]."""
        key = tuple(diffusion.timestep_map)
        if key not in self.times:
            self.times[key] = self.time_embed(torch.tensor(key[::-1])).to(self.dtype)
        return self.times[key]

    def denoise(self, x, mods, copies):
        """x [n, C] in the working dtype, mods [3*depth+2, copies*n, W] -> eps and variance logits, [copies*n, 2C]."""
        h = self.input(x)
        if copies == 2:
            h = torch.cat([h, h])
        for i, (norm, fc1, fc2) in enumerate(self.blocks):
            shift, scale, gate = mods[3 * i], mods[3 * i + 1], mods[3 * i + 2]
            h = torch.addcmul(h, gate, fc2(fc1(torch.addcmul(shift, norm(h), scale), "swish")))
        shift, scale = mods[3 * self.depth], mods[3 * self.depth + 1]
        return self.final(torch.addcmul(shift, self.final_norm(h), scale))

    def sample(self, z, scale, guided, request, iteration, draws):
        """z [R, D] (guided: conditional rows, then unconditional) -> tokens [n, C] in float32."""
        steps, channels, n = request.diffusion.steps, self.channels, len(z) // (2 if guided else 1)
        x = draws.initial(iteration, n, channels)
        noise = draws.steps(iteration, steps, n, channels)
        self.time_table(request.diffusion)
        loop = self.replay if device.kind() == "cuda" else self.loop
        return loop(self.cond(z), x, noise, torch.as_tensor(scale, dtype=torch.float32), guided, request)

    def replay(self, c, x, noise, scale, guided, request):
        """loop as a CUDA graph, captured once for each number of rows: without it the launches take most of the time."""
        inputs = (c, x, noise, scale)
        key = (c.shape, guided, request.temperature, tuple(request.diffusion.timestep_map))
        if key not in self.graphs:
            static = [v.clone() for v in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.loop(*static, guided, request)  # libraries allocate at their first call, which a capture forbids
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.loop(*static, guided, request)
            self.graphs[key] = graph, static, out
        graph, static, out = self.graphs[key]
        for held, given in zip(static, inputs):
            held.copy_(given)
        graph.replay()
        return out.clone()

    def loop(self, c, x, noise, scale, guided, request):
        """The reverse process: conditions c [R, W], x [n, C], noise [S, n, C], scale a number -> tokens [n, C]."""
        diffusion, channels, copies = request.diffusion, self.channels, 2 if guided else 1
        rows, n, times = len(c), len(x), self.time_table(diffusion)
        per_step = rows * (3 * self.depth + 2) * self.width * c.element_size()
        chunk = max(1, (MODULATION_BYTES if device.kind() == "cpu" else CUDA_MODULATION_BYTES) // per_step)
        for first in range(0, diffusion.steps, chunk):
            y = F.silu(times[first : first + chunk, None] + c)
            mods = self.ada(y.view(-1, self.width)).view(len(y), rows, -1, self.width).transpose(1, 2)
            for k in range(len(y)):
                out = self.denoise(x.to(self.dtype), mods[k], copies).float()
                eps, v = out[:n, :channels], out[:n, channels:]
                if guided:
                    eps = torch.lerp(out[n:, :channels], eps, scale)
                x = self.reverse_step(diffusion, diffusion.steps - 1 - first - k, x, eps, v, noise[first + k],
                                      request.temperature)
        return x

    @staticmethod
    def reverse_step(diffusion, t, x, eps, v, noise, temperature):
        """One ancestral step; the mean is linear in x and eps, the log-deviation in v, with constants of the step."""
        c1, c2 = diffusion.posterior_mean_coef1[t], diffusion.posterior_mean_coef2[t]
        of_x = float(c1 * diffusion.sqrt_recip_alphas_cumprod[t] + c2)
        of_eps = float(c1 * diffusion.sqrt_recipm1_alphas_cumprod[t])
        mean = torch.sub(x * of_x, eps, alpha=of_eps)
        if t == 0:
            return mean
        low, high = diffusion.posterior_log_variance_clipped[t], diffusion.log_betas[t]
        sigma = torch.exp_(v * float((high - low) / 4) + float((high + low) / 4))
        return torch.addcmul(mean, sigma, noise, value=temperature)


class TunedSampler:
    """Samples with the weights of a model.MAR, in float32 or bfloat16; takes the MAR's blocks and head away to free them."""

    def __init__(self, mar, dtype):
        mar.requires_grad_(False)
        self.dtype, self.seq_len, self.buffer, self.channels = dtype, mar.seq_len, mar.buffer, mar.channels
        self.class_emb, self.fake_latent = mar.class_emb, mar.fake_latent
        self.z_proj = mar.z_proj  # K is 16: float32 costs nothing
        self.z_proj_ln = mar.z_proj_ln
        self.encoder_pos = mar.encoder_pos_embed_learned[0]
        self.encoder_blocks = [TunedBlock(b, dtype) for b in mar.encoder_blocks]
        self.encoder_norm = Norm(mar.encoder_norm, dtype)
        self.decoder_embed = Packed(mar.decoder_embed.weight, mar.decoder_embed.bias, dtype)
        self.decoder_pos = mar.decoder_pos_embed_learned[0].to(dtype)
        self.decoder_base = (mar.mask_token[0] + mar.decoder_pos_embed_learned[0]).to(dtype)
        depth = len(mar.decoder_blocks)
        self.decoder_blocks = [TunedBlock(b, dtype, last=i == depth - 1) for i, b in enumerate(mar.decoder_blocks)]
        self.decoder_norm = Norm(mar.decoder_norm, dtype)
        self.diffusion_pos = mar.diffusion_pos_embed_learned[0].to(dtype)
        self.head = TunedHead(mar.diffloss.net, dtype)
        del mar.encoder_blocks, mar.decoder_blocks, mar.diffloss

    def context(self):
        return torch.inference_mode()

    def prepare(self, request):
        self.head.time_table(request.diffusion)

    def encode(self, tokens, visible, embedding):
        """tokens [N, L, C], visible [N, vis] indices, embedding [M*N, D], M = 2 with guidance -> [M*N, buffer+vis, D]."""
        copies = len(embedding) // len(tokens)
        shown = self.z_proj(tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.channels)))
        shown = self.z_proj_ln(shown + self.encoder_pos[self.buffer + visible]).to(self.dtype).repeat(copies, 1, 1)
        buffer = self.z_proj_ln(embedding.unsqueeze(1) + self.encoder_pos[: self.buffer]).to(self.dtype)
        x = torch.cat([buffer, shown], dim=1)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, visible, predict):
        """Encoder output, visible [N, vis] and predict [N, p] indices -> condition of the predicted tokens, [M*N, p, D]."""
        copies = len(x) // len(visible)
        visible, predict = visible.repeat(copies, 1), predict.repeat(copies, 1)
        e = self.decoder_embed(x)
        full = self.decoder_base.repeat(len(x), 1, 1)
        full[:, : self.buffer] = e[:, : self.buffer] + self.decoder_pos[: self.buffer]
        at = (self.buffer + visible).unsqueeze(-1).expand(-1, -1, e.shape[-1])
        full.scatter_(1, at, e[:, self.buffer :] + self.decoder_pos[self.buffer + visible])
        for block in self.decoder_blocks[:-1]:
            full = block(full)
        out = self.decoder_blocks[-1](full, rows=self.buffer + predict)
        return self.decoder_norm(out) + self.diffusion_pos[predict]

    def sample(self, request, draws, clock):
        """Tokens [N, L, C]. Iterations outside request.subset are not run: their tokens become unit normal noise."""
        n, guided = request.batch, request.cfg != 1.0
        tokens = torch.zeros(n, self.seq_len, self.channels)
        orders = draws.orders(n, self.seq_len)
        if request.labels is None:
            embedding = self.fake_latent.expand(n, -1)
        else:
            embedding = self.class_emb(torch.tensor(request.labels))
        if guided:
            embedding = torch.cat([embedding, self.fake_latent.expand(n, -1)])
        counts = masked_counts(self.seq_len, request.iters)
        for step in range(request.iters):
            # The order is filled from its end; sorting keeps rows in raster order, as the authors' boolean masks do.
            predict = orders[:, counts[step + 1] : counts[step]].sort(dim=1).values
            visible = orders[:, counts[step] :].sort(dim=1).values
            at = predict.unsqueeze(-1).expand(-1, -1, self.channels)
            if step not in request.subset:
                tokens.scatter_(1, at, draws.normal(*at.shape))
                continue
            scale = cfg_scale(request.cfg, request.cfg_schedule, self.seq_len, counts[step + 1])
            started = device.now()
            x = self.encode(tokens, visible, embedding)
            encoded = device.now()
            z = self.decode(x, visible, predict).flatten(0, 1)
            decoded = device.now()
            sampled = self.head.sample(z, scale, guided, request, step, draws)
            headed = device.now()
            tokens.scatter_(1, at, sampled.view(at.shape))
            clock.iteration(step, enc=encoded - started, dec=decoded - encoded, head=headed - decoded,
                            total=device.now() - started, rows=len(z))
        return tokens
