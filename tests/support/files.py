"""Damaged files."""


def broken(data, share, how, new):
    """Bytes with a fault at a share of their length: cut off, dropped, replaced or inserted."""
    at = min(int(share * len(data)), len(data) - 1)
    if how == "cut":
        return data[:at]
    rest = data[at + len(new) :] if how != "insert" else data[at:]
    return data[:at] + (b"" if how == "drop" else new) + rest
