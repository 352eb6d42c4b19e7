"""Heights and channels of image networks whose size doubles in every block."""


def heights_of(shape: tuple[int, ...], base_height: int, grows: bool = False) -> list[int]:
    """Heights from `base_height` to that of images (*space, channels), each twice the previous.

    Raises:
      ValueError: doubling does not lead to the height of the images, their other sizes cannot be
        halved as often, or a network that grows already starts at that height.
    """
    *space, _ = shape
    heights = [base_height]
    while heights[-1] < space[0]:
        heights.append(2 * heights[-1])
    factor = heights[-1] // base_height
    if heights[-1] != space[0] or any(n % factor for n in space):
        size = "x".join(map(str, space))
        raise ValueError(
            f"base_height={base_height}: doubling it does not lead to images of {size}, all of "
            "whose sizes must halve equally often"
        )
    if grows and len(heights) == 1:
        raise ValueError(
            f"base_height={base_height} must be below {space[0]}, the height that the network "
            "grows to"
        )
    return heights


def channels_at(height: int, full_height: int, channels: int, maximum: int) -> int:
    """`channels` at full height, doubled at each halving, at most `maximum`."""
    return min(channels * (full_height // height), maximum)
