"""Every mistake of sm90_mutants.py can still be planted."""

import shutil

import pytest
from sm90_mutants import KERNELS, MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_what_it_replaces_stands_there_once(mutant, tmp_path):
    shutil.copytree(KERNELS / "sm90", tmp_path / "sm90")
    assert (KERNELS / "sm90" / f"{mutant.source}.cu").exists()
    mutant.apply(tmp_path)
    changed = [
        p.name
        for p in (tmp_path / "sm90").iterdir()
        if p.read_bytes() != (KERNELS / "sm90" / p.name).read_bytes()
    ]
    assert changed == [mutant.file]
