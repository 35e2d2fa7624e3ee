"""Colours of groups: as different as can be, and text that is legible on them."""

PINNED = "#c4c4c4"

# After Kelly, Twenty-Two Colors of Maximum Contrast, 1965. Where colours repeat, the
# numbers tell groups apart.
_COLORS = (
    "#0067a5 #f38400 #008856 #be0032 #875692 #f3c300 #a1caf1 #e68fac #882d17 "
    "#8db600 #604e97 #f99379 #b3446c #dcd300 #654522 #e25822 #2b3d26 #f6a600"
).split()


def group_color(number: int) -> str:
    """The colour of a group, lighter or darker where it repeats; 0 is pinned.

    Example:
        >>> group_color(1), group_color(0)
        ('#0067a5', '#c4c4c4')
    """
    if number == 0:
        return PINNED
    cycle, place = divmod(number - 1, len(_COLORS))
    toward, share = ((0.0, 0.0), (255.0, 0.45), (0.0, 0.4))[cycle % 3]
    parts = (part + share * (toward - part) for part in _parts(_COLORS[place]))
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def readable_on(color: str) -> str:
    """Black or white, whichever has more contrast (WCAG 2, relative luminance).

    Example:
        >>> readable_on("#f3c300"), readable_on("#2b3d26")
        ('black', 'white')
    """
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (p / 255 for p in _parts(color))
    ]
    red, green, blue = linear
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _parts(color: str) -> list[int]:
    return [int(color[k : k + 2], 16) for k in (1, 3, 5)]
