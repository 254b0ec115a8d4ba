"For DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True), with versvideo installed."
import versvideo.pipelines.loading  # noqa: F401  diffusers then knows the classes of the parts
from versvideo.pipelines.text_to_video import VersVideoPipeline  # noqa: F401
