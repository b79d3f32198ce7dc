"""The augmentation "photo": do to training images what photos do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .infer import SIZE


def photo_like(images: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """Do to images uint8 [B, 32, 32, 3] what photos do: framing, background, focus, light, noise, compression.

    Every strength is drawn from uniform [B, 17], 0..1; noise is standard normal [B, 3, 32, 32].
    """
    u = (2 * uniform - 1)[..., None, None]  # -1..1
    zoom, aspect, angle, *shift = u[:, :5, 0, 0].unbind(1)
    width, height = (0.5 * zoom + 0.2 * aspect).exp(), (0.5 * zoom - 0.2 * aspect).exp()  # 0.5 to 2 times the picture
    cos, sin = (0.2 * angle).cos(), (0.2 * angle).sin()  # up to 11 degrees
    rows = [width * cos, -height * sin, 0.25 * shift[0]], [width * sin, height * cos, 0.25 * shift[1]]
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), [len(images), 3, SIZE, SIZE], False)
    pictures = images.permute(0, 3, 1, 2) / 255
    x = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    # behind three of five pictures lies a corner of another one, enlarged; the others are mirrored at their edges
    corner = torch.cat([0.35 * torch.eye(2, device=u.device).expand(len(u), 2, 2), 0.6 * u[:, 15:, 0].sign()], 2)
    behind = F.grid_sample(pictures.flip(0), F.affine_grid(corner, list(x.shape), False), align_corners=False)
    inside = (8 * (1.06 - grid.abs().amax(-1)[:, None])).clamp(0, 1)  # with a soft edge
    x = torch.where(uniform[:, 14, None, None, None] < 0.6, behind.lerp(x, inside), x)
    x = x + 0.8 * u[:, 5:6] * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))  # from blurred to sharpened
    grey, middle = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    x = (grey + (1 + 0.5 * u[:, 6:7]) * (x - grey)) * (1 + 0.1 * u[:, 7:10])  # saturation and white balance
    x = (x - middle) * (0.25 * u[:, 10:11]).exp() + middle + 0.12 * u[:, 11:12]  # contrast and brightness
    x = x + 0.04 * uniform[:, 12, None, None, None] * noise
    return (255 * _jpeg(x, 1.5 * uniform[:, 13] ** 2)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _jpeg(x: Tensor, coarseness: Tensor) -> Tensor:
    """Round the 8x8 cosine coefficients of [B, 3, 32, 32] in 0..1, as JPEG does at quality 50 for a coarseness [B] of 1."""
    k = torch.arange(8, device=x.device)
    cosine = ((2 * k + 1) * k[:, None] * math.pi / 16).cos() * torch.where(k == 0, 1 / 8, 1 / 4).sqrt()[:, None]
    step = (12 + 6 * (k[:, None] + k)) / 255 * coarseness.clamp(min=0.02).view(-1, 1, 1, 1, 1, 1)  # close to Annex K's
    blocks = x.reshape(-1, 3, 4, 8, 4, 8).transpose(3, 4)  # [B, 3, 4, 4, 8, 8]
    rounded = (cosine @ blocks @ cosine.T / step).round() * step
    return (cosine.T @ rounded @ cosine).transpose(3, 4).reshape(x.shape)
