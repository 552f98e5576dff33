"""The published encoders in NumPy and double precision, read off their layouts; slow on purpose.

Each function takes a state dict under the *published* names, one cloud, and the indices of centres
and members, and gives its feature. Nothing is shared with the package. Tolerance of float32
against it: 1e-4 relative to the largest feature.
"""

from __future__ import annotations

import math

import numpy as np


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(x, weight, bias=None):
    weight = weight.reshape(len(weight), -1)  # convolutions of size 1 are linear layers
    return x @ weight.T + (0 if bias is None else bias)


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def batch_norm(x, s, name):
    shift = (x - s[f"{name}.running_mean"]) / np.sqrt(s[f"{name}.running_var"] + 1e-5)
    return shift * s[f"{name}.weight"] + s[f"{name}.bias"]


def attention(q, k, v, n_heads):
    """One head and one query after the other."""
    width = q.shape[1] // n_heads
    out = np.zeros_like(q)
    for head in range(n_heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            scores = np.array([q[i, part] @ key / math.sqrt(width) for key in k[:, part]])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[i, part] = sum(w * value for w, value in zip(weights, v[:, part], strict=True))
    return out


def group_net(points, s, name):
    """One group, shape (k, channels)."""
    x = linear(points, s[f"{name}.first_conv.0.weight"], s[f"{name}.first_conv.0.bias"])
    x = np.maximum(batch_norm(x, s, f"{name}.first_conv.1"), 0)
    x = linear(x, s[f"{name}.first_conv.3.weight"], s[f"{name}.first_conv.3.bias"])
    x = np.hstack([np.tile(x.max(0), (len(x), 1)), x])
    x = linear(x, s[f"{name}.second_conv.0.weight"], s[f"{name}.second_conv.0.bias"])
    x = np.maximum(batch_norm(x, s, f"{name}.second_conv.1"), 0)
    x = linear(x, s[f"{name}.second_conv.3.weight"], s[f"{name}.second_conv.3.bias"])
    return x.max(0)


def position(center, s, name):
    x = gelu(linear(center, s[f"{name}.0.weight"], s[f"{name}.0.bias"]))
    return linear(x, s[f"{name}.2.weight"], s[f"{name}.2.bias"])


def tokens(s, xyz, rgb, centers, members, bridge):
    made = []
    for center, group in zip(centers, members, strict=True):
        points = xyz[group] - xyz[center]
        if rgb is not None:
            points = np.hstack([points, rgb[group]])
        made.append(group_net(points, s, "point_encoder.encoder"))
    lifted = linear(np.array(made), s[f"{bridge}.weight"], s[f"{bridge}.bias"])
    x = np.vstack([s["point_encoder.cls_token"][0], lifted])
    places = [position(xyz[center], s, "point_encoder.pos_embed") for center in centers]
    return x, np.vstack([s["point_encoder.cls_pos"][0], places])


def ulip(s, xyz, rgb, centers, members, n_heads):
    x, pos = tokens(s, xyz, rgb, centers, members, "point_encoder.reduce_dim")
    depth = 0
    while f"point_encoder.blocks.blocks.{depth}.norm1.weight" in s:
        name = f"point_encoder.blocks.blocks.{depth}"
        x = x + pos
        h = layer_norm(x, s[f"{name}.norm1.weight"], s[f"{name}.norm1.bias"], 1e-5)
        q, k, v = np.split(linear(h, s[f"{name}.attn.qkv.weight"]), 3, axis=1)
        h = attention(q, k, v, n_heads)
        x = x + linear(h, s[f"{name}.attn.proj.weight"], s[f"{name}.attn.proj.bias"])
        h = layer_norm(x, s[f"{name}.norm2.weight"], s[f"{name}.norm2.bias"], 1e-5)
        h = gelu(linear(h, s[f"{name}.mlp.fc1.weight"], s[f"{name}.mlp.fc1.bias"]))
        x = x + linear(h, s[f"{name}.mlp.fc2.weight"], s[f"{name}.mlp.fc2.bias"])
        depth += 1
    x = layer_norm(x, s["point_encoder.norm.weight"], s["point_encoder.norm.bias"], 1e-5)
    return np.concatenate([x[0], x[1:].max(0)]) @ s["pc_projection"]


def uni3d(s, xyz, rgb, centers, members, n_heads):
    x, pos = tokens(s, xyz, rgb, centers, members, "point_encoder.encoder2trans")
    x = x + pos
    depth = 0
    while f"point_encoder.visual.blocks.{depth}.norm1.weight" in s:
        name = f"point_encoder.visual.blocks.{depth}"
        h = layer_norm(x, s[f"{name}.norm1.weight"], s[f"{name}.norm1.bias"], 1e-6)
        if f"{name}.attn.qkv.weight" in s:
            q, k, v = np.split(linear(h, s[f"{name}.attn.qkv.weight"]), 3, axis=1)
            q, v = q + s[f"{name}.attn.q_bias"], v + s[f"{name}.attn.v_bias"]
        else:
            q = linear(h, s[f"{name}.attn.q_proj.weight"], s[f"{name}.attn.q_proj.bias"])
            k = linear(h, s[f"{name}.attn.k_proj.weight"])
            v = linear(h, s[f"{name}.attn.v_proj.weight"], s[f"{name}.attn.v_proj.bias"])
        h = attention(q, k, v, n_heads)
        x = x + linear(h, s[f"{name}.attn.proj.weight"], s[f"{name}.attn.proj.bias"])
        h = layer_norm(x, s[f"{name}.norm2.weight"], s[f"{name}.norm2.bias"], 1e-6)
        if f"{name}.mlp.fc1_g.weight" in s:
            gate = linear(h, s[f"{name}.mlp.fc1_g.weight"], s[f"{name}.mlp.fc1_g.bias"])
            h = silu(gate) * linear(h, s[f"{name}.mlp.fc1_x.weight"], s[f"{name}.mlp.fc1_x.bias"])
            h = layer_norm(h, s[f"{name}.mlp.norm.weight"], s[f"{name}.mlp.norm.bias"], 1e-6)
        else:
            h = linear(h, s[f"{name}.mlp.fc1.weight"], s[f"{name}.mlp.fc1.bias"])
            if h.shape[1] == s[f"{name}.mlp.fc2.weight"].shape[1]:
                h = gelu(h)
            else:
                gate, value = np.split(h, 2, axis=1)
                h = silu(gate) * value
        x = x + linear(h, s[f"{name}.mlp.fc2.weight"], s[f"{name}.mlp.fc2.bias"])
        depth += 1
    name = "point_encoder.visual.fc_norm"
    x = layer_norm(x[0], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)
    return linear(x, s["point_encoder.trans2embed.weight"], s["point_encoder.trans2embed.bias"])


def openshape(s, xyz, rgb, centers, members, n_heads):
    inside = "ppat." if "ppat.cls_token" in s else ""
    s = {key.removeprefix(inside): value for key, value in s.items()}
    made = []
    for center, group in zip(centers, members, strict=True):
        x = np.hstack([xyz[group] - xyz[center], xyz[group], rgb[group]])
        for i in range(3):
            x = linear(x, s[f"sa.mlp_convs.{i}.weight"], s[f"sa.mlp_convs.{i}.bias"])
            x = np.maximum(batch_norm(x, s, f"sa.mlp_bns.{i}"), 0)
        made.append(np.concatenate([xyz[center], x.max(0)]))
    x = linear(np.array(made), s["lift.0.weight"], s["lift.0.bias"])
    x = layer_norm(x, s["lift.2.weight"], s["lift.2.bias"], 1e-5)
    x = np.vstack([s["cls_token"], x])
    depth = 0
    while f"transformer.layers.{depth}.0.norm.weight" in s:
        attn, mlp = f"transformer.layers.{depth}.0", f"transformer.layers.{depth}.1"
        h = layer_norm(x, s[f"{attn}.norm.weight"], s[f"{attn}.norm.bias"], 1e-5)
        q, k, v = np.split(linear(h, s[f"{attn}.fn.to_qkv.weight"]), 3, axis=1)
        h = attention(q, k, v, n_heads)
        x = x + linear(h, s[f"{attn}.fn.to_out.0.weight"], s[f"{attn}.fn.to_out.0.bias"])
        h = layer_norm(x, s[f"{mlp}.norm.weight"], s[f"{mlp}.norm.bias"], 1e-5)
        h = gelu(linear(h, s[f"{mlp}.fn.net.0.weight"], s[f"{mlp}.fn.net.0.bias"]))
        x = x + linear(h, s[f"{mlp}.fn.net.3.weight"], s[f"{mlp}.fn.net.3.bias"])
        depth += 1
    return x[0] if "proj.weight" not in s else linear(x[0], s["proj.weight"], s["proj.bias"])
