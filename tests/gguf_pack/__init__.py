"""A pack with ComfyUI-GGUF's loader of diffusion models by the same names, which does the same in the shortest way."""

import sys
from pathlib import Path

import folder_paths

_TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(_TESTS), str(_TESTS.parent / "tools")]

import gguf_files  # noqa: E402

folders, _ = folder_paths.folder_names_and_paths["diffusion_models"]
folder_paths.folder_names_and_paths["unet_gguf"] = (folders, {".gguf"})


def gguf_sd_loader(path):
    return gguf_files.read(path), {"metadata": {}}


class GGMLOps(gguf_files.Layers):
    pass


class UnetLoaderGGUF:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load_unet", "loaders"

    def load_unet(self, unet_name):
        return (gguf_files.load(folder_paths.get_full_path("unet_gguf", unet_name), GGMLOps),)


NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF}
