"""Sizes of an image network that doubles them block by block."""


def heights_of(
    shape: tuple[int, ...], base_height: int, flag: str, grows: bool = False
) -> list[int]:
    """The heights from `base_height` to that of images (*space, channels), each twice the last.

    Raises:
      ValueError: they do not lead there, or another size of the image does not halve as often;
        or the images have the base height, below which there is nothing that they grew from.
    """
    *space, _ = shape
    heights = [base_height]
    while heights[-1] < space[0]:
        heights.append(2 * heights[-1])
    factor = heights[-1] // base_height
    if heights[-1] != space[0] or any(n % factor for n in space):
        size = "x".join(map(str, space))
        raise ValueError(
            f"{flag}={base_height}: doubling it does not lead to images of {size}, all of whose "
            "sizes are to be halved as often"
        )
    if grows and len(heights) == 1:
        raise ValueError(f"{flag}={base_height} must be below {space[0]}, the height grown to")
    return heights


def channels_at(height: int, full_height: int, channels: int, most: int) -> int:
    """`channels` at full height, twice as many at each halving, at most `most`."""
    return min(channels * (full_height // height), most)
