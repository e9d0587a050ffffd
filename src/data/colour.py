"""What changes the values of pixels and leaves them in their places, for a batch of images.

Every function takes images (B, C, S, S) in [0, 1] and, where the change has a strength, one for
each image, (B,); it returns new images in [0, 1]. The definitions are Pillow's and torchvision's.
"""

import torch
from torch import Tensor


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed, in this order, by factors (B, 3)."""
    images = brightness(images, factors[:, 0])
    return saturation(contrast(images, factors[:, 1]), factors[:, 2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is black, 1 the image."""
    return (images * per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """0 is an even grey, the image's mean; 1 the image."""
    return blend(grey(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """0 is the image in grey, 1 the image; an image of one channel stays as it is."""
    return blend(grey(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is the image blurred, each pixel by its 8 neighbours, which weigh 1 against its own 5; 1
    the image; above it is sharpened. The outermost pixels stay as they are.
    """
    inside = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    squares = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # sums of 3 x 3 pixels
    sharper = images.clone()
    sharper[:, :, 1:-1, 1:-1] = blend((squares + 4 * inside) / 13, inside, factor)
    return sharper


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Each pixel keeps so many of its 8 bits, the high ones."""
    step = per_image(2 ** (8 - bits))
    return (images * 255).round_().div_(step).floor_().mul_(step).div_(255)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Pixels from the threshold on are inverted."""
    return torch.where(images >= per_image(threshold), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched so that it has its darkest pixel at 0 and its brightest at 1; one that
    is even stays as it is.
    """
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor) -> Tensor:
    """Each channel's values spread so that all of 0 to 255 are about equally frequent.

    As in Pillow, whose step is a whole number: a channel with fewer than 255 pixels below its
    brightest value stays as it is.
    """
    levels = (images * 255).round_().long().flatten(2)  # (B, C, S * S)
    counts = levels.new_zeros(*levels.shape[:2], 256)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    up_to = counts.cumsum(dim=2) - counts  # how many pixels are darker
    table = ((up_to + step // 2) // step.clamp(min=1)).clamp_(max=255)
    equal = table.gather(2, levels).view_as(images) / 255
    return torch.where(step.unsqueeze(3) > 0, equal, images)


def grey(images: Tensor) -> Tensor:
    """The brightness of each pixel, (B, 1, S, S): of red, green and blue as the eye weighs them
    (ITU-R BT.601), else the mean of the channels.
    """
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """On the way from `start` at 0 to the images at 1, or beyond them; exactly the images at 1."""
    return torch.lerp(start, images, per_image(factor)).clamp_(0, 1)


def per_image(values: Tensor) -> Tensor:
    """(B,), to be combined with images: (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
