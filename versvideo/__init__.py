"""Text-to-video latent diffusion: an open implementation of VersVideo (ICLR 2024)."""

__version__ = "0.1.0"

from importlib import import_module

# What most users need; each is imported when it is first asked for, since torch alone takes seconds.
_PLACES = {
    "load_pipeline": "pipelines.loading",
    "VersVideoPipeline": "pipelines.text_to_video",
    "VersVideoUNet": "models.unet",
    "VersVideoControlNet": "models.controlnet",
    "TCMVAE": "models.vae",
    "evaluate": "metrics.evaluate",
    "read_clip": "media.video",
    "read_video": "media.video",
    "write_video": "media.video",
    "extract_condition": "data.conditions",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(import_module(f"versvideo.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'versvideo' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
