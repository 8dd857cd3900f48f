"""Scripts that let shells complete the verbs and options of the command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script for a shell.

    Args:
      shell: one of `SHELLS`.
      verbs: the parser of each verb.
    """
    options = {verb: _options(parser) for verb, parser in verbs.items()}
    if shell == "fish":
        return _fish(verbs, options)
    cases = "\n".join(f"    {verb}) words='{' '.join(own)}' ;;" for verb, own in options.items())
    body = _BASH.format(verbs=" ".join(verbs), cases=cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{body}" if shell == "zsh" else body


def _options(parser: argparse.ArgumentParser) -> list[str]:
    actions = parser._actions
    shown = [action for action in actions if action.help != argparse.SUPPRESS]
    return [option for action in shown for option in action.option_strings if len(option) > 2]


_BASH = """\
_ckpt_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=''
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='{verbs}'
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  case $word in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) [ "$COMP_CWORD" -eq 1 ] && COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
  esac
}}
complete -o default -F _ckpt_jax ckpt_jax
"""


def _fish(verbs: Mapping[str, argparse.ArgumentParser], options: Mapping[str, list[str]]) -> str:
    lines = []
    for verb, parser in verbs.items():
        about = (parser.description or "").replace("'", "\\'")
        lines.append(f"complete -c ckpt_jax -n __fish_use_subcommand -a {verb} -d '{about}'")
        lines += [
            f"complete -c ckpt_jax -n '__fish_seen_subcommand_from {verb}' -l {option[2:]}"
            for option in options[verb]
        ]
    return "\n".join(lines) + "\n"
