"""QM9's molecules, from files that the user has."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError

ELEMENTS = ("H", "C", "N", "O", "F")
PROPERTIES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")


class Molecule(NamedTuple):
    """Atoms float32 `[atoms, 9]`: position, one-hot of `ELEMENTS`, charge; and the `PROPERTIES`, float64 `[15]`."""

    atoms: np.ndarray
    properties: np.ndarray


class QM9(World):
    """Molecules as sets of atoms; the target is one property of the molecule, a set of one element.

    An atom is [x, y, z, one-hot of H C N O F, Mulliken charge], in ångström and elementary charges, as in the files of
    the data set (Ramakrishnan, Dral, Rupp, von Lilienfeld, 2014); properties are in its units, mostly atomic ones
    (homo: hartree). The target is standardised: (property - mean) / deviation, both of the training part and in
    `standard` after `setup`.

    `worlds_seed` decides which molecules are trained on and which validate. To leave out those that the authors list
    as inconsistent, move them away.

    Args:
        folder: folder of dsgdb9nsd.xyz.tar.bz2, unpacked: dsgdb9nsd_000001.xyz and so on.
        target: one of `PROPERTIES`.
        arguments: those of `World`.

    Raises:
        InputError: on `setup`, a folder without files, fewer molecules than asked for, or a damaged file.
    """

    def __init__(self, *, folder: str, target: str = "homo", **arguments: Any) -> None:
        super().__init__(**arguments)
        if target not in PROPERTIES:
            raise InputError(f"unknown property {target!r} of a molecule; expected one of {', '.join(PROPERTIES)}")
        self.folder, self.target = Path(folder), PROPERTIES.index(target)
        self.standard: tuple[float, float] | None = None

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        paths = self._paths()
        molecules = [read_molecule(path) for path in paths[split]]
        values = np.array([molecule.properties[self.target] for molecule in molecules])
        if self.standard is None:  # also where only the validation part is wanted
            of = values if split == "train" else [read_molecule(p).properties[self.target] for p in paths["train"]]
            self.standard = float(np.mean(of)), float(np.std(of)) or 1.0
        mean, deviation = self.standard
        sizes = np.array([len(molecule.atoms) for molecule in molecules])
        mask = np.arange(sizes.max()) < sizes[:, None]
        atoms = np.zeros((*mask.shape, 4 + len(ELEMENTS)), dtype=np.float32)
        atoms[mask] = np.concatenate([molecule.atoms for molecule in molecules])
        target = ((values - mean) / deviation).astype(np.float32)
        return {"input": atoms, "input_mask": mask, "elements": target[:, None, None]}

    def _paths(self) -> dict[str, list[Path]]:
        """Files of each part."""
        paths = sorted(self.folder.glob("dsgdb9nsd_*.xyz"))
        wanted = self.counts["train"] + self.counts["val"]
        if len(paths) < wanted:
            raise InputError(
                f"expected {wanted} molecules of QM9 at {self.folder}/dsgdb9nsd_*.xyz, found {len(paths)}; unpack "
                "dsgdb9nsd.xyz.tar.bz2 there, or ask for fewer train_sets and val_sets"
            )
        shuffled = np.random.default_rng([self.worlds_seed, 2]).permutation(len(paths))
        val, train = np.split(shuffled[:wanted], [self.counts["val"]])
        return {"train": [paths[i] for i in train], "val": [paths[i] for i in val]}


def read_molecule(path: Path) -> Molecule:
    """Read a file: number of atoms; "gdb", number of the molecule and properties; a line for each atom; the rest.

    Numbers may be written as 2.1*^-6.

    Raises:
        InputError: a line that is something else.
    """
    number = 1
    try:
        lines = path.read_text(encoding="ascii").replace("*^", "e").splitlines()
        atoms = np.zeros((int(lines[0]), 4 + len(ELEMENTS)), dtype=np.float32)
        number = 2
        properties = _numbers(lines[1].split()[2:], len(PROPERTIES))
        for number, atom in enumerate(atoms, start=3):
            element, *numbers = lines[number - 1].split()
            atom[3 + ELEMENTS.index(element)] = 1
            atom[[0, 1, 2, -1]] = _numbers(numbers, 4)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}, line {number}: expected a molecule as QM9 has them, got something else ({error}); unpack it again"
        ) from error
    return Molecule(atoms, properties)


def _numbers(words: list[str], count: int) -> np.ndarray:
    numbers = np.array(words, dtype=np.float64)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"not {count} numbers")
    return numbers
