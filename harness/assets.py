"""Names of the generated files: models relative to ComfyUI's ``models`` folder, pictures in its ``input`` folder."""

SD15_CHECKPOINT = "checkpoints/luna_demo_sd15.safetensors"
SDXL_UNET = "diffusion_models/luna_demo_sdxl_unet.safetensors"
SDXL_VAE = "vae/luna_demo_sdxl_taesd.safetensors"
CLIP_VISION = "clip_vision/luna_demo_vit_l.safetensors"
SD15_PLUS = "ipadapter/luna_demo_plus_sd15.safetensors"
SD15_PLAIN = "ipadapter/luna_demo_plain_sd15.safetensors"
SD15_LORA = "loras/luna_demo_few_steps_sd15.safetensors"
SDXL_PLUS = "ipadapter/luna_demo_plus_sdxl.safetensors"
SDXL_PLAIN = "ipadapter/luna_demo_plain_sdxl.safetensors"

# The trained family: small networks that have learnt drawn faces, see training/README.md.
PAINTED_FACES = "luna_faces_painted.png"
FACES_CHECKPOINT = "checkpoints/luna_faces_sd15.safetensors"
FACES_CLIP_VISION = "clip_vision/luna_faces_vit_l.safetensors"
FACES_PLUS = "ipadapter/luna_faces_plus_sd15.safetensors"

PAINTED_ASTRONAUT = "luna_astronaut_painted.png"  # the same with five regions painted in the mask editor's way
ASTRONAUT = "luna_astronaut.png"  # 512x512 px, public domain
