import pytest

from tests.benchmark.command import CFG, ROOT, main
from tools import benchmark

RESNET = str(ROOT / "configs/imagenet/oct_resnet50_v1b_a0.5.yaml")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("model", "--cfg", CFG, "--rounds", "0"), "--rounds, --workers, --batch and --threads are 1 or more"),
        (("model", "--cfg", "none.yaml"), "none.yaml"),
        (("model", "--cfg", CFG, "--fuse", "--mode", "training"), "--fuse is for inference alone"),
        (("model", "--cfg", CFG, "--backend", "openvino", "--mode", "both"), "--backend openvino is for inference"),
        (("model", "--cfg", CFG, "--naive", "OCTAVE.ALPHA", "0"), "--naive is another form of an octave network"),
        (("model", "--cfg", CFG, "--naive", "--alphas", "0"), "--naive is another form of an octave network"),
        (("model", "--cfg", CFG, "--json", "none/x.json"), "none/x.json: no folder none to write to"),
        (("model", "--cfg", CFG, "--table2"), "--table2 is of ResNet-50: give a config of resnet50 or resnet50_v1b"),
        (("model", "--cfg", RESNET, "--table2", "--alphas", ".3"), "with alphas of 0, 0.125, 0.25, 0.5, 0.75"),
        (("model", "--cfg", RESNET, "--table2", "--against", RESNET), "leave --against out"),
        (("model", "--cfg", CFG, "--against", "none.yaml"), "none.yaml"),
        (("model", "--cfg", CFG, "--against", "pytorchvideo"), "pytorchvideo has no i3d_tiny to measure against"),
        (("data", "--cfg", CFG, "DATA.TRAIN_LIST", "none.txt"), "none.txt"),
        (("data", "--cfg", CFG, "--workers", "0"), "--rounds, --workers, --batch and --threads are 1 or more"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    status, out, err = main(*arguments)
    assert status == 2 and out == "" and message in err
    assert err.count("\n") == 1 or "none.yaml" in arguments  # a config's problems, one a line


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--alphas", ".5,x"), "'.5,x' is no list of alphas such as .125,.25"),
        (("--alphas", ".5,2"), "alpha 2 is not from 0 to 1"),
        (("--alphas", "nan"), "alpha nan is not from 0 to 1"),
        (("--backend", "tvm"), "invalid choice: 'tvm'"),
        (("--mode", "test"), "invalid choice: 'test'"),
        (("--dtype", "float64"), "invalid choice: 'float64'"),
    ],
)
def test_values_that_a_flag_has_not(arguments: tuple[str, ...], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["model", "--cfg", CFG, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
