"""A fast copy of CLEVR's renderer: a ray caster in PyTorch, and scenes by CLEVR's rules.

Exact: `camera`, `shapes`, `ground`, `visibility`. Approximate, with constants fitted to Blender's images: `lighting`,
`materials`. Scenes: `scenes`, `sampling`, `records`. Images: `renderer`.
"""
