import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from count_instructions import counts, kind_of  # noqa: E402

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
.L_x_2:
        /*0020*/              @!P0 FFMA R8, R4, R5, R8 ;
        /*0030*/                   ISETP.NE.AND P1, PT, R3, RZ, PT ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P2 EXIT ;
        /*0060*/               @P3 BRA `(.L_x_1) ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0080*/                   EXIT ;
        /*0090*/                   WARPSYNC.ALL ;
        /*00a0*/                   BRA `(.L_x_1) ;
"""


def test_loops_have_their_inner_ones_once():
    (whole, every), *loops = counts(LISTING.splitlines())
    assert whole == "in all" and every.total() == 11
    assert every == dict(integer=1, shared=1, float=1, select=1, branch=6, wait=1)
    # What is behind the kernel's end jumps back into it, which makes no loop.
    assert [(name, by_kind.total()) for name, by_kind in loops] == [("loop 2-4", 3), ("loop 1-6", 6)]
    assert loops[0][1] == dict(float=1, select=1, branch=1)


def test_kinds_of_instructions():
    kinds = dict(
        products="HGMMA.64x32x16.F32.BF16", float="FMNMX", double="DADD", special="MUFU.EX2", convert="F2FP.BF16.F32",
        select="FSETP.GEU.AND", shared="LDSM.16.M88.4", local="STL.64", exchange="SHFL.BFLY", wait="BAR.SYNC",
        branch="BRA", integer="IMAD.WIDE",
    )  # fmt: skip
    for kind, name in kinds.items():
        assert kind_of(name) == kind
    assert kind_of("LDGSTS.E.BYPASS.128") == kind_of("LDG.E") == kind_of("STG.E.64") == "global"
