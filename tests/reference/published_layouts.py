"""Names and shapes in the published checkpoints, written out from their authors' model code.

Only what encoding clouds needs; `SPARE` has names that come along and are not read.
"""

from __future__ import annotations


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def dense(name, out, inside, *, bias=True, tail=()):
    return {f"{name}.weight": (out, inside, *tail), **({f"{name}.bias": (out,)} if bias else {})}


def batch_norm(name, dim):
    running = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
    return {**norm(name, dim), **running, f"{name}.num_batches_tracked": ()}


def mini_pointnet(name, channels, out):
    return {
        **dense(f"{name}.first_conv.0", 128, channels, tail=(1,)),
        **batch_norm(f"{name}.first_conv.1", 128),
        **dense(f"{name}.first_conv.3", 256, 128, tail=(1,)),
        **dense(f"{name}.second_conv.0", 512, 512, tail=(1,)),
        **batch_norm(f"{name}.second_conv.1", 512),
        **dense(f"{name}.second_conv.3", out, 512, tail=(1,)),
    }


def pointbert(channels=3, dim=384, depth=12, group_dim=256, embed_dim=512):
    p = "point_encoder"
    keys = {
        "pc_projection": (2 * dim, embed_dim),
        f"{p}.cls_token": (1, 1, dim),
        f"{p}.cls_pos": (1, 1, dim),
        **mini_pointnet(f"{p}.encoder", channels, group_dim),
        **dense(f"{p}.reduce_dim", dim, group_dim),
        **dense(f"{p}.pos_embed.0", 128, 3),
        **dense(f"{p}.pos_embed.2", dim, 128),
        **norm(f"{p}.norm", dim),
    }
    for i in range(depth):
        b = f"{p}.blocks.blocks.{i}"
        keys |= norm(f"{b}.norm1", dim) | norm(f"{b}.norm2", dim)
        keys |= dense(f"{b}.attn.qkv", 3 * dim, dim, bias=False)
        keys |= dense(f"{b}.attn.proj", dim, dim)
        keys |= dense(f"{b}.mlp.fc1", 4 * dim, dim) | dense(f"{b}.mlp.fc2", dim, 4 * dim)
    return keys


def openshape(dim=512, depth=12, inner=512, mlp=1536, sa=(64, 64, 256), embed_dim=1280):
    p = "ppat." if embed_dim else ""
    keys = {f"{p}cls_token": (dim,)}
    for i, (a, b) in enumerate(zip((9, *sa), sa, strict=False)):
        keys |= dense(f"{p}sa.mlp_convs.{i}", b, a, tail=(1, 1)) | batch_norm(
            f"{p}sa.mlp_bns.{i}", b
        )
    keys |= dense(f"{p}lift.0", dim, sa[-1] + 3, tail=(1,)) | norm(f"{p}lift.2", dim)
    for i in range(depth):
        attn, ff = f"{p}transformer.layers.{i}.0", f"{p}transformer.layers.{i}.1"
        keys |= norm(f"{attn}.norm", dim) | norm(f"{ff}.norm", dim)
        keys |= dense(f"{attn}.fn.to_qkv", 3 * inner, dim, bias=False)
        keys |= dense(f"{attn}.fn.to_out.0", dim, inner)
        keys |= dense(f"{ff}.fn.net.0", mlp, dim) | dense(f"{ff}.fn.net.3", dim, mlp)
    return keys | (dense("proj", embed_dim, dim) if embed_dim else {})


def uni3d(dim, depth, hidden, kind, group_dim=512, embed_dim=1024):
    p = "point_encoder"
    keys = {
        f"{p}.cls_token": (1, 1, dim),
        f"{p}.cls_pos": (1, 1, dim),
        **mini_pointnet(f"{p}.encoder", 6, group_dim),
        **dense(f"{p}.encoder2trans", dim, group_dim),
        **dense(f"{p}.trans2embed", embed_dim, dim),
        **dense(f"{p}.pos_embed.0", 128, 3),
        **dense(f"{p}.pos_embed.2", dim, 128),
        **norm(f"{p}.visual.fc_norm", dim),
    }
    for i in range(depth):
        b = f"{p}.visual.blocks.{i}"
        keys |= (
            norm(f"{b}.norm1", dim) | norm(f"{b}.norm2", dim) | dense(f"{b}.attn.proj", dim, dim)
        )
        if kind == "split":
            keys |= dense(f"{b}.attn.q_proj", dim, dim) | dense(f"{b}.attn.v_proj", dim, dim)
            keys |= dense(f"{b}.attn.k_proj", dim, dim, bias=False)
            keys |= dense(f"{b}.mlp.fc1_g", hidden, dim) | dense(f"{b}.mlp.fc1_x", hidden, dim)
            keys |= norm(f"{b}.mlp.norm", hidden)
        else:
            keys |= dense(f"{b}.attn.qkv", 3 * dim, dim, bias=False)
            keys |= {f"{b}.attn.q_bias": (dim,), f"{b}.attn.v_bias": (dim,)}
            keys |= dense(f"{b}.mlp.fc1", hidden * (2 if kind == "packed" else 1), dim)
        keys |= dense(f"{b}.mlp.fc2", dim, hidden)
    return keys


def layouts():
    """By name of the encoder, at full size."""
    return {
        "ulip": pointbert(),
        "ulip2": pointbert(channels=6, depth=18, embed_dim=1280),
        "openshape": openshape(),
        "openshape-l14": openshape(embed_dim=768),
        "openshape-b32": openshape(embed_dim=None),
        "uni3d-ti": uni3d(192, 12, 512, "packed"),
        "uni3d-s": uni3d(384, 12, 1024, "packed"),
        "uni3d-b": uni3d(768, 12, 2048, "split"),
        "uni3d-l": uni3d(1024, 24, 2730, "split"),
        "uni3d-g": uni3d(1408, 40, 6144, "gelu"),
    }


SPARE = {
    "ulip": (
        "visual.cls_token",
        "transformer.resblocks.0.ln_1.weight",
        "text_projection",
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.bias",
        "image_projection",
    ),
    "ulip2": ("open_clip_model.visual.proj", "open_clip_model.logit_scale"),
    "uni3d": (
        "point_encoder.visual.cls_token",
        "point_encoder.visual.pos_embed",
        "point_encoder.visual.patch_embed.proj.weight",
        "point_encoder.visual.head.bias",
    ),
    "openshape": (),
}
