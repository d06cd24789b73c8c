"""CLEVR's pictures made anew: scenes by its rules, its camera, lamps, shapes and materials, as a ray caster in torch.

Exact: `camera`, `shapes`, `ground`, `visibility`. Approximated, with constants measured on Blender's pictures:
`lighting`, `materials`. Which scenes there are: `scenes`, `sampling`. All of it together: `renderer`.
"""
