"""Shell scripts are read as a shell would read them, as far as the text tells; nothing is run."""

import pytest

from cvx_core import FormatError
from cvx_io.importing import shell


def script_of(text, tmp_path):
    path = tmp_path / "s.sh"
    path.write_text(text)
    return shell.read_script(path)


def words_of(text, tmp_path):
    return script_of(text, tmp_path).commands[-1].words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\nrun --a $A --b ${A}x", ("run", "--a", "1", "--b", "1x")),
        ("A=(1 '2 3')\nrun \"${A[@]}\"", ("run", "1", "2 3")),
        ("A=(1 2 # it's the second\n 3)\nrun ${A[1]} ${#A[@]} ${A[@]}", ("run", "2", "3", "1", "2", "3")),
        ("A='x y'\nrun $A \"$A\" '$A'", ("run", "x", "y", "x y", "$A")),
        ("A='x y'\nrun pre$A\"post $A\"", ("run", "prex", "ypost x y")),
        ("N=8; M=$(($N*2 - 4))\nrun $M $((N/M))", ("run", "12", "0")),
        ("A=(1)\nA+=(2)\nrun ${A[@]}", ("run", "1", "2")),
        ('A="--x"\nA+=" --y"\nrun $A', ("run", "--x", "--y")),
        ("export A=1 B=2\nrun $A$B", ("run", "12")),
        ("run ${B:-5} \\\n  --c  # note", ("run", "5", "--c")),
        ('run ${B:-${C:-"a b"}} end', ("run", "a", "b", "end")),
        (": ${B:=7}\nrun $B", ("run", "7")),
        ("run ${B:=7} $B", ("run", "7", "7")),
        ("B=1\nrun ${B:+yes} ${C:+no}", ("run", "yes")),
        ("X=1 Y=2 run a#b", ("run", "a#b")),
        ("run $(rm -rf /) $UNSET", ("run", "$(rm -rf /)", "$UNSET")),
        ('A="$(f "x y" | g \'(\')"\nrun $A', ("run", "$(f \"x y\" | g '(')")),
        ("run a >out 2>&1", ("run", "a")),
        ("run a &>/dev/null", ("run", "a")),
        ("run $((9**9)) $((1/0))", ("run", "$((9**9))", "$((1/0))")),
        ('C="run --p \\"it\'s a b\\""\neval $C', ("run", "--p", "it's a b")),
        ("cat <<EOF\ndon't \"stop\nEOF\nrun a", ("run", "a")),
        ("cat <<-'EOF' >f\n\tx'\n\tEOF\nrun a", ("run", "a")),
        ('run "$@" $* a', ("run", "a")),
        ("for i in {1..2}; do echo $i; done\nrun a", ("run", "a")),
        ("nohup run a &", ("run", "a")),
        ("(cd x; run a)", ("run", "a")),
        ("unset A\nrun $A b", ("run", "b")),
    ],
)
def test_words_are_filled_in_as_a_shell_would_and_nothing_is_run(text, words, tmp_path):
    assert words_of(text, tmp_path) == words


def test_paths_of_the_script_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    here = 'D="$( cd -- "$( dirname -- "${BASH_SOURCE[0]}" )" &> /dev/null && pwd )"\n'
    assert words_of(f'{here}run $D/a "$(dirname "$D")" $(basename $0)', tmp_path) == (
        "run",
        f"{tmp_path}/a",
        f"{tmp_path.parent}",
        "s.sh",
    )
    assert words_of("run $PWD/a $(pwd) $(basename $0 .sh)", tmp_path) == (
        "run",
        f"{tmp_path.parent}/a",
        f"{tmp_path.parent}",
        "s",
    )


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ('[ "$N" -eq 8 ]', True),
        ("[ $N -ne 8 ]", False),
        ("[ $N -le 8 -a $N -gt 7 ]", True),
        ("[ $N -lt 8 -o $N -ge 9 ]", False),
        ('[ "$S" = on ]', True),
        ('[ "$S" == off ]', False),
        ('[[ $S != "off" ]]', True),
        ("[[ $S == o* && $N -gt 1 ]]", True),
        ("[[ $S == off || ( $N -gt 1 && -n $S ) ]]", True),
        ("[[ ! -z $S ]]", True),
        ('[ -z "$E" ]', True),
        ('[ -n "$E" ]', False),
        ("! [ $N -eq 8 ]", False),
        ("test $N -eq 8", True),
        ("(( N > 7 ))", True),
        ("[ $N ]", True),
        ("[ $# -lt 1 ]", True),
        ("true", True),
        ("false", False),
        ('[ "$UNSET" -eq 1 ]', None),
        ('[ "$(nproc)" -gt 4 ]', None),
        ("[ -f there ]", None),
        ('[[ -f there || $S == "on" ]]', True),
        ("[[ -f there && $S == off ]]", False),
        ("[[ $S =~ ^o ]]", None),
        ("grep -q x y", None),
    ],
)
def test_the_branch_that_holds_is_taken(condition, holds, tmp_path):
    text = f"N=8 S=on E=\nA=before\nif {condition}; then A=then; else A=else; fi\nrun $A"
    command = script_of(text, tmp_path).commands[-1]
    assert command.words == ("run", {True: "then", False: "else", None: "${A}"}[holds])
    assert command.unknown == (frozenset({1}) if holds is None else frozenset())


def test_branches_are_read_one_by_one(tmp_path):
    text = "N={}\nif [ $N -eq 1 ]; then A=1\nelif [ $N -le 8 ]; then\n  A=8\nelse A=many\nfi\nrun $A"
    for number, found in ((1, "1"), (4, "8"), (9, "many")):
        assert words_of(text.format(number), tmp_path) == ("run", found)
    script = script_of(text.format("$(nproc)"), tmp_path)
    assert script.undecided == {"A": "`[ $N -eq 1 ]` on line 2"}
    assert "`[ $N -eq 1 ]` on line 2 is not decided, so A is not known after it" in script.notes


def test_what_all_branches_agree_on_is_known(tmp_path):
    assert words_of("A=1\nif x; then B=2; A=1; else B=2; fi\nrun $A $B", tmp_path) == ("run", "1", "2")
    assert words_of("if x; then A=1; exit 1; fi\nA=${A:-2}\nrun $A", tmp_path) == ("run", "2")
    script = script_of('case "$1" in\n  a|b) A=1 ;;\n  *) A=2\n  ;;\nesac\nrun $A', tmp_path)
    assert script.commands[-1].unknown == {1}
    assert list(script.undecided) == ["A"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\n[ $A -eq 1 ] && A=2\nrun $A", ("run", "2")),
        ("A=1\n[ $A -eq 2 ] && A=2\nrun $A", ("run", "1")),
        ("A=1\n[ $A -eq 2 ] || A=3\nrun $A", ("run", "3")),
        ("A=1\nmkdir x || exit 1\nrun $A", ("run", "1")),
        ("A=1\nmkdir x && A=2\nrun $A", ("run", "2")),
        ("A=1\nwhich x && A=2\nrun $A", ("run", "${A}")),
        ("while [ $# -gt 0 ]; do A=$1; shift; done\nrun ${A:-none}", ("run", "none")),
        ("while read line; do A=$line; done < f\nrun $A", ("run", "${A}")),
        ('go() { local n=$1; run $n "$@"; }\ngo 5 6', ("run", "5", "5", "6")),
        ("function go {\n  run $1\n}\ngo 5\n", ("run", "5")),
    ],
)
def test_conditions_loops_and_functions_are_followed(text, words, tmp_path):
    assert words_of(text, tmp_path) == words


def test_a_function_that_nobody_calls_is_named(tmp_path):
    script = script_of("go() {\n  python train.py\n}\n", tmp_path)
    assert shell.launches(script) == []
    assert script.uncalled == {"go": 1}


def test_a_folder_that_is_entered_is_said(tmp_path):
    notes = script_of("cd /repo && python train.py", tmp_path).notes
    assert notes == ["line 1: `cd /repo` is not followed: paths of the script start here"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A=1\necho 'x\n", "s.sh:2: a quote ' is not closed"),
        ('echo "a\n', 's.sh:1: a quote " is not closed'),
        ("run $(x\n", r"s.sh:1: \$\( is not closed"),
        ("\nif [ 1 ]; then\n  run\n", "s.sh:2: 'if' has no 'fi'"),
        ("for a in b; do run", "s.sh:1: 'for' has no 'done'"),
    ],
)
def test_a_script_that_is_cut_off_is_an_error_with_its_line(text, says, tmp_path):
    with pytest.raises(FormatError, match=says):
        script_of(text, tmp_path)
