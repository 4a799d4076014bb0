"""A tab completion script for bash and zsh, made from the verbs' own parsers.

The script is static: it completes verbs, options and their choices without starting Python. `shtab` needs all verbs in
one tree of parsers and their choices declared to argparse, whose errors suggest no near name; `argcomplete` starts
Python, about 0.2 s, at every TAB.
"""

import argparse
from collections.abc import Callable, Iterator

from moonwhale.options import parser_of

# In a completion function $2 is the word to complete and $3 the word before it. No reply means names of files.
SCRIPT = """\
# To complete moonwhale in bash or zsh: eval "$(moonwhale --completion)"
[ -n "${ZSH_VERSION-}" ] && autoload -U +X bashcompinit && bashcompinit
_moonwhale() {
    local arguments="" options="" flags="" values="" line="${COMP_WORDS[*]:1:$((COMP_CWORD - 1))}"
    case "$line" in
%s
    esac
    if [[ "$3" == --* && " $flags " != *" $3 "* ]]; then arguments="$values"
    elif [[ "$2" == -* ]]; then arguments="$options"
    fi
    COMPREPLY=($(compgen -W "$arguments" -- "$2"))
}
complete -o default -F _moonwhale moonwhale
"""


def script(verbs: dict[str, Callable[[list[str]], object]]) -> str:
    """Return the completion script for verbs and their `main` functions."""
    cases = [f'    "") arguments="{" ".join(verbs)}" options="--help --version --completion";;']
    for verb, main in verbs.items():
        cases += _cases(verb, parser_of(main))
    return SCRIPT % "\n".join(cases)


def _cases(words: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the `case` clauses of a verb: first those of its subcommands, whose words are longer."""
    arguments, options, flags, values = [], [], [], []
    for action in parser._actions:
        offered = " ".join(getattr(action, "suggestions", None) or action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield from _cases(f"{words} {name}", subparser)
        names = [name for name in action.option_strings if name.startswith("--")]
        options += names
        if not names:
            arguments.append(offered)
        elif action.nargs == 0:
            flags += names
        elif offered:
            values.append(f'{"|".join(names)}) values="{offered}";;')
    lists = {"arguments": arguments, "options": options, "flags": flags}
    assignments = " ".join(f'{name}="{" ".join(filter(None, content))}"' for name, content in lists.items())
    yield f'    "{words}"|"{words} "*) {assignments}'
    yield f'        case "$3" in {" ".join(values)} esac;;'
