"""Format numbers and bytes for people."""


def si(number: float) -> str:
    """Format a number with three digits and a unit prefix: 7.11 M."""
    power = 0
    while number >= 999.5 and power < 6:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {' kMGTPE'[power]}".rstrip()


def in_bytes(number: float) -> str:
    """Format a number of bytes the same way: 7.11 MB."""
    return si(number) + "B" if number >= 999.5 else f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Format a time roughly: `40 s`, `3 min 20 s`, `2 h 5 min`, `6 days 2 h`."""
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "days", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
