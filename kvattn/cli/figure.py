"""Files of figures."""

from pathlib import Path

from kvattn.errors import ConfigError, MissingLibraryError


def writable(path: Path) -> None:
    """Checks the name of a figure before anything is computed.

    Raises:
        ConfigError: an ending that is no format of a figure.
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingLibraryError("--plot needs matplotlib: pip install 'kvattn[cli]'.") from error
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"--plot {path}: the name must end in one of {', '.join(sorted(formats))}.")
