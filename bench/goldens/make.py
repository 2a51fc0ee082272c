"""Makes the goldens of testdata/goldens that other libraries compute: tiny autoencoders, and a DiT, with random weights
in the layouts that margo reads, and what the libraries they come from compute with them.

    python make.py OUT [NAME…]

Run by `make goldens`. Weights are rounded to bf16 and stored so (half the size), but the libraries compute in float32
with the rounded values. Every parameter is drawn, norms and biases too, so that none can be missed or swapped without
a difference. Seeds are fixed; another version of PyTorch may change the last bits of the outputs.

Traces hold NCHW float32 tensors, as `margo verify` reads them:

    image, moments, mean, logvar, std, sample_noise, sample     encoding, KL
    image, prequant, indices [N,h,w], quant                     encoding, VQ: before the codebook, codes, their vectors
    z, decoded_z; mean, decoded_mode                            decoding, KL
    z, decoded_z; codes [N,h,w], decoded_codes                  decoding, VQ: z goes through the codebook first
    tokens [N,L,C·p·p], decoded_tokens                          decoding what a MAR makes (metadata patch_size, latent_scale)
    x, t, y, t_embed, out                                       a DiT's forward pass
    orders, iterI.init_noise, iterI.step_noise                  the draws that a MAR made the tokens of
"""

import json
import math
import os
import sys
import tempfile
import types

import torch
from safetensors.torch import save_file
from torch import nn

MAX_BYTES = 1 << 20


def stand_ins():
    """taming and LDM import their trainer at the top; only nn.Module is needed of it to run a model."""
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = nn.Module
    sys.modules["pytorch_lightning"] = lightning
    main = types.ModuleType("taming.main")  # the training program, with the one function that models import
    main.instantiate_from_config = instantiate
    sys.modules["taming.main"] = main


def instantiate(config):
    """The loss of a training run: a part of Lightning's checkpoints that is no part of the tokenizer."""
    return nn.Linear(2, 2)


def randomize(model, seed):
    """Draws every parameter: weights that keep the variance, norms about 1, biases about 0; rounded to bf16."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.randn(p.shape, generator=g)
            if p.ndim == 3 or name in ("quantize.embedding.weight", "class_emb.weight", "fake_latent"):
                r *= 0.5  # tables: a codebook is about as wide as what it quantises
            elif p.ndim > 1:
                r /= math.sqrt(p[0].numel())
            elif p.ndim == 1 and name.endswith("weight"):
                r = 1 + 0.2 * r
            elif p.ndim == 1:
                r *= 0.1
            p.copy_(r.bfloat16().float())
    return model.eval()


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed, n, h, w):
    """Smooth pictures in [-1, 1]."""
    low = drawn(seed, n, 3, max(h // 4, 1), max(w // 4, 1))
    return torch.tanh(nn.functional.interpolate(low, size=(h, w), mode="bilinear"))


def half(state):
    return {k: v.bfloat16().contiguous() if v.is_floating_point() else v for k, v in state.items()}


def sort_metadata(path):
    """safetensors writes metadata in any order; sorted, equal contents are equal files."""
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            assert len(text) == size, path
            f.seek(8)
            f.write(text)


class Writer:
    def __init__(self, out, only):
        self.out, self.only = out, only

    def path(self, name):
        return os.path.join(self.out, name)

    def check(self, name):
        size = os.path.getsize(self.path(name))
        if size > MAX_BYTES:
            sys.exit(f"{name} has {size} bytes, more than {MAX_BYTES}")
        print(f"{name}: {size} bytes")

    def weights(self, name, state, metadata=None):
        save_file(half(state), self.path(name), metadata)
        sort_metadata(self.path(name))
        self.check(name)

    def lightning(self, name, state):
        """What Lightning's trainer leaves: the state dict beside its own affairs."""
        torch.save({"epoch": 3, "global_step": 12, "pytorch-lightning_version": "1.4.2", "callbacks": {},
                    "optimizer_states": [], "lr_schedulers": [], "state_dict": half(state)}, self.path(name))
        self.check(name)

    def trace(self, name, tensors, **metadata):
        save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, self.path(name), {k: str(v) for k, v in metadata.items()})
        sort_metadata(self.path(name))
        self.check(name)


def kl_trace(encode, decode, seed, n, h, w):
    """encode gives moments [N,2C,h,w], decode takes latents. Some hundred latents at least: limits are made of the largest
    differences, and the largest of few numbers is luck."""
    x = image(seed, n, h, w)
    moments = encode(x)
    mean, logvar = moments.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    std, noise = torch.exp(0.5 * logvar), drawn(seed + 1, *mean.shape)
    z = drawn(seed + 2, *mean.shape)
    return dict(image=x, moments=moments, mean=mean, logvar=logvar, std=std, sample_noise=noise, sample=mean + std * noise,
                z=z, decoded_z=decode(z), decoded_mode=decode(mean))


def diffusers_trace(model, seed, n, h, w):
    def encode(x):
        d = model.encode(x).latent_dist
        return d.parameters
    return kl_trace(encode, lambda z: model.decode(z).sample, seed, n, h, w)


def kl_config(**changes):
    return dict(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                block_out_channels=[32, 64, 32], layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=32) | changes


def make_diffusers(w):
    """AutoencoderKL as diffusers writes it today (to_q …)."""
    from diffusers import AutoencoderKL
    model = randomize(AutoencoderKL(**kl_config()), 1)
    w.weights("kl_diffusers.safetensors", model.state_dict())
    w.trace("kl_diffusers_io.safetensors", diffusers_trace(model, 10, 2, 32, 48))


class Recorded(dict):
    """Draws of the PyTorch peer (bench/peers/draws.py) that stay on record."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def orders(self, images, tokens):
        self["orders"] = torch.stack([torch.randperm(tokens, generator=self.generator) for _ in range(images)])
        return self["orders"]

    def initial(self, iteration, rows, channels):
        self[f"iter{iteration}.init_noise"] = x = torch.randn(rows, channels, generator=self.generator)
        return x

    def step(self, iteration, step, rows, channels):
        key, x = f"iter{iteration}.step_noise", torch.randn(rows, channels, generator=self.generator)
        kept = x[: len(self[f"iter{iteration}.init_noise"])]  # with guidance the second half is never seen
        self[key] = torch.cat([self.get(key, kept[:0]), kept])
        return x


def make_mar_kl8(w):
    """A MAR on the 32×32 latents of a KL-8, in tokens of 2×2 positions (P45), from the first draw to pixels: the trunk and
    head of the PyTorch peer, which is checked against the authors' own goldens, and the autoencoder of diffusers_old."""
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "peers"))
    from eager import EagerSampler
    from mar_torch import Clock, Request
    from model import MAR, resolve_config
    config = resolve_config(dict(img_size=256, vae_stride=8, patch_size=2, vae_embed_dim=4, encoder_embed_dim=32, encoder_depth=1,
                                 encoder_num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, mlp_ratio=2.0,
                                 class_num=5, buffer_size=4, diffloss_d=1, diffloss_w=32))
    mar, scale = randomize(MAR(config), 7), 0.5
    for p in mar.diffloss.net.final_layer.linear.parameters():  # large variances would explode
        p.copy_((p / 8).bfloat16().float())
    w.weights("mar_kl8.safetensors", mar.state_dict(), {"kind": "mar", "config": json.dumps(config), "latent_scale": str(scale),
                                                         "tokenizer": "kl_diffusers_old.safetensors", "iters": "3", "head_steps": "4"})
    request = Request(1, [3], iters=3, head_steps=4, cfg=2.0, temperature=0.9, max_timestep=600)
    draws = Recorded(80)
    tokens = EagerSampler(mar, torch.float32).sample(request, draws, Clock())
    tokenizer = make_diffusers_old(None)
    pixels = tokenizer.decode(mar.unpatchify(tokens) / scale).sample
    w.trace("mar_kl8_run.safetensors", dict(tokens=tokens, decoded_tokens=pixels, **draws), patch_size=2, latent_scale=scale, label=3, iters=3,
            head_steps=4, cfg=2, cfg_schedule="linear", temperature=0.9, max_timestep=600)
    if not 0.3 < tokens.std() < 30:
        sys.exit(f"tokens have a deviation of {tokens.std()}")


def make_diffusers_old(w):
    """The names of diffusers before 0.13 (query, key, value, proj_attn), in which sd-vae-ft-mse and -ema are published, with
    their four levels. The library itself reads the file back: what it computes then is the golden."""
    from diffusers import AutoencoderKL
    config = kl_config(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[32] * 4)
    model = randomize(AutoencoderKL(**config), 42)
    if w is None:
        return model
    old = {}
    for name, v in model.state_dict().items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        old[name] = v
    w.weights("kl_diffusers_old.safetensors", old)
    with tempfile.TemporaryDirectory() as folder:
        model.save_config(folder)
        save_file(half(old), os.path.join(folder, "diffusion_pytorch_model.safetensors"))
        read = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    for name, v in model.state_dict().items():
        assert torch.equal(v, read.state_dict()[name]), name
    w.trace("kl_diffusers_old_io.safetensors", diffusers_trace(read, 30, 2, 64, 64))


def make_diffusers_bare(w):
    """Without quant_conv and post_quant_conv, as the autoencoders of Stable Diffusion 3 and FLUX are."""
    from diffusers import AutoencoderKL
    model = randomize(AutoencoderKL(**kl_config(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                                                block_out_channels=[32, 32], latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)), 3)
    w.weights("kl_diffusers_bare.safetensors", model.state_dict())
    w.trace("kl_diffusers_bare_io.safetensors", diffusers_trace(model, 40, 1, 32, 48))


def dd_config(**changes):
    return dict(double_z=False, z_channels=8, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[2, 1], num_res_blocks=1,
                attn_resolutions=[16], dropout=0.0) | changes


def make_kl_ldm(w):
    """LDM's AutoencoderKL with attention at the lowest level on both sides, as kl-f16 has it."""
    from ldm.models.autoencoder import AutoencoderKL
    model = randomize(AutoencoderKL(dd_config(double_z=True), dict(target="torch.nn.Identity"), embed_dim=4), 4)
    w.weights("kl_ldm.safetensors", model.state_dict())
    w.trace("kl_ldm_io.safetensors", kl_trace(lambda x: model.encode(x).parameters, model.decode, 50, 2, 48, 32))


def margin(t, codebook):
    """How much nearer the nearest code is than the second, at the worst position of t, as a share of its distance."""
    d = torch.cdist(t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]).double(), codebook.double()) ** 2
    two = d.topk(2, largest=False).values
    return ((two[:, 1] - two[:, 0]) / two[:, 1]).min()


def vq_trace(model, seed, n, h, w):
    """model is a VQModel: encoder, quant_conv, quantize, post_quant_conv, decoder. Numbers are drawn again until no
    code is only just the nearest: the golden would depend on rounding."""
    codebook = model.quantize.embedding.weight
    for seed in range(seed, seed + 1000, 3):
        x = image(seed, n, h, w)
        before = model.quant_conv(model.encoder(x))
        z = drawn(seed + 1, *before.shape)
        if min(margin(before, codebook), margin(z, codebook)) > 2e-4:
            break
    else:
        sys.exit("no image without near ties")
    quant, _, (_, _, indices) = model.quantize(before)
    shape = (n, *before.shape[2:])
    if indices.unique().numel() < 16:
        sys.exit("too few codes are used")
    codes = torch.randint(0, model.quantize.n_e, shape, generator=torch.Generator().manual_seed(seed + 2))
    vectors = model.quantize.get_codebook_entry(codes.reshape(-1), (*shape, before.shape[1]))
    return dict(image=x, prequant=before, indices=indices.reshape(shape), quant=quant,
                z=z, decoded_z=model.decode(model.quantize(z)[0]), codes=codes, decoded_codes=model.decode(vectors))


def make_vq_taming(w):
    """taming's VQModel as Lightning saves it: state_dict with the loss's tensors, attention at the lowest level."""
    from taming.models.vqgan import VQModel
    model = randomize(VQModel(dd_config(), dict(target="loss"), n_embed=128, embed_dim=16), 5)
    w.lightning("vq_taming.ckpt", model.state_dict())
    w.trace("vq_taming_io.safetensors", vq_trace(model, 60, 2, 16, 8))


def make_vq_ldm(w):
    """LDM's VQ layout: its Encoder and Decoder around taming's quantizer, embed_dim 8 (ldm autoencoder.py VQModel, which
    the package leaves out; these are its five modules and its encode and decode)."""
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    from taming.models.vqgan import VQModel
    model = VQModel(dd_config(), dict(target="loss"), n_embed=256, embed_dim=8)
    config = dd_config(z_channels=4)
    model.encoder, model.decoder = Encoder(**config), Decoder(**config)
    model.quant_conv, model.post_quant_conv = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
    randomize(model, 6)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("loss.")}
    w.weights("vq_ldm.safetensors", state)
    w.trace("vq_ldm_io.safetensors", vq_trace(model, 70, 1, 16, 24))


def make_dit_diffusers(w):
    """diffusers' DiT, which margo reads by translating names. Three things of the library are made the authors': the
    slowest frequency of the timestep embedding (downscale_freq_shift 0, not 1), the second norm's eps (1e-6, not 1e-5), and
    the embedders, of which every block has a copy, are the first block's everywhere."""
    from diffusers import DiTTransformer2DModel
    model = randomize(DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8,
                                            num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6), 8)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    config = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=2, mlp_ratio=4.0, num_classes=10)
    w.weights("dit_diffusers.safetensors", model.state_dict(), {"config": json.dumps(config)})
    x, t, y = drawn(80, 4, 4, 8, 8), torch.tensor([999, 500, 20, 0]), torch.tensor([3, 10, 0, 9])
    out = model(x, timestep=t, class_labels=y).sample
    embedded = first.timestep_embedder(first.time_proj(t))
    w.trace("dit_diffusers_io.safetensors", dict(x=x, t=t, y=y, out=out, t_embed=embedded))


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    makers = {k[5:]: f for k, f in globals().items() if k.startswith("make_")}
    names = sys.argv[2:] or list(makers)
    for name in names:
        if name not in makers:
            sys.exit(f"{name} is none of {', '.join(makers)}")
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # plain float32 sums, the same on every machine
    stand_ins()
    w = Writer(sys.argv[1], names)
    with torch.no_grad():
        for name in names:
            makers[name](w)


if __name__ == "__main__":
    main()
