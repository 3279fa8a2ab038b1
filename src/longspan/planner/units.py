"""Numbers of a plan as people read them: seconds up to years, bytes, parameters."""

GIB = 2**30
DAY = 86_400
LONG = ((365 * DAY, 365 * DAY, "years"), (2 * DAY, DAY, "days"), (3600, 3600, "hours"))
"""From how many seconds on which unit, in seconds, is used."""


def duration(value: float) -> str:
    """Seconds as text: "819 us", "7.79 s", and above an hour "2.40 hours", "3.10 days" or "1.20 years"."""
    for least, unit, name in LONG:
        if value >= least:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def count_text(value: float) -> str:
    """A number of parameters as text: "1.41M", "8.03B"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def gib(value: float) -> str:
    """Bytes as text in GiB: "52.6 GiB", and below 0.1 GiB with three digits."""
    return f"{value / GIB:,.1f} GiB" if value >= 0.1 * GIB or not value else f"{value / GIB:.3g} GiB"


def mib(value: float) -> str:
    """Bytes as text in MiB: "280.0 MiB"."""
    return f"{value / 2**20:,.1f} MiB"
