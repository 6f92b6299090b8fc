"""A batch of images before a training step: cropped, mirrored, partly covered, resized.

    images = resized(split.normalize(augment(images, generator, 4, True, 8, split.mean)), 24)
"""

import torch
import torch.nn.functional as F


def resized(images, size):
    """float32 [B, C, H, W] -> [B, C, size, size], bilinear and antialiased; None: unchanged."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def augment(images, generator, crop, flip, cutout, mean):
    """Random crop of the zero-padded image, mirror and cutout, one draw an image.

    uint8 [B, 3, H, W] -> uint8 of the same shape.
    """
    batch, _, height, width = images.shape
    where = images.device
    rows = torch.arange(height).expand(batch, height)
    columns = torch.arange(width).expand(batch, width)
    if crop:
        shift = torch.randint(0, 2 * crop + 1, (2, batch, 1), generator=generator)
        rows = rows + shift[0]
        columns = columns + shift[1]
        images = F.pad(images, [crop] * 4)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]
    pixels = images.permute(0, 2, 3, 1)[tuple(i.to(where) for i in index)]
    images = pixels.permute(0, 3, 1, 2)
    if cutout:
        sides = torch.tensor([height, width]).view(2, 1, 1)
        centre = torch.rand(2, batch, 1, generator=generator) * sides
        row_inside = (torch.arange(height) - centre[0]).abs() < cutout / 2
        column_inside = (torch.arange(width) - centre[1]).abs() < cutout / 2
        hole = (row_inside[:, :, None] & column_inside[:, None, :]).unsqueeze(1).to(where)
        fill = (torch.tensor(mean, device=where) * 255).to(torch.uint8).view(1, 3, 1, 1)
        images = torch.where(hole, fill, images)
    return images
