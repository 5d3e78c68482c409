"""
Uploads a model or an adapter to the Hugging Face Hub, with everything that others need to load it.

    sparse-moe-vlm push outputs/demo/model user/my-model --dry-run       # list what would be uploaded, without network
    sparse-moe-vlm push outputs/demo/model user/my-model --private
    sparse-moe-vlm push outputs/demo/model user/my-model --revision v2   # a branch, which is created
    sparse-moe-vlm push outputs/smolvlm-sparse someone/their-model --create-pr
    sparse-moe-vlm push outputs/lora/experts/adapter user/my-adapter --base-model user/my-model

One commit contains the configurations, the weights (safetensors), the processor, the chat template, the code, the
model card (README.md) and the licence. Nothing else in the folder is uploaded. A missing model card is written, and
missing code is added from this package. Everything else that is missing is an error. Paths of this machine are removed,
and tokens are refused.

Log in with `hf auth login`, or set HF_TOKEN. If the upload is interrupted, run the command again: files that were
uploaded completely are not uploaded again. Files in the repository that this command did not write are only replaced
with --force.

The exit code is 2 if something must be changed first, and 1 if the upload failed and can be repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .mistakes import mistakes_in_one_line
from .options import add_json_option, only_json

if TYPE_CHECKING:
    from ..hub import PushPlan

EXIT_CODE_OF_INTERRUPTED_UPLOADS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a model or of a LoRA adapter")
    parser.add_argument("repository", metavar="user/name", help="repository on the Hub, which is created if needed")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to upload to, which is created if needed (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--base-model", metavar="NAME", help="model on the Hub that an adapter was trained on")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--force", action="store_true", help="replace files that this command did not write")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and upload nothing")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..hub import PushInterruptedError, plan_push, push_checkpoint
    from ..hub.push import check_destination

    with only_json(arguments.json), mistakes_in_one_line():
        try:
            check_destination(arguments.create_pr, arguments.revision)
            if arguments.dry_run:
                plan = plan_push(arguments.checkpoint, arguments.repository, base_model=arguments.base_model)
                made: dict[str, Any] = {}
                is_unchanged = True
            else:
                pushed = push_checkpoint(
                    arguments.checkpoint,
                    arguments.repository,
                    private=arguments.private or None,
                    revision=arguments.revision,
                    create_pr=arguments.create_pr,
                    force=arguments.force,
                    base_model=arguments.base_model,
                    commit_message=arguments.message,
                )
                plan = pushed.plan
                made = {"url": pushed.url, "commit": pushed.commit, "deleted": pushed.deleted}
                is_unchanged = pushed.is_unchanged
        except PushInterruptedError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_CODE_OF_INTERRUPTED_UPLOADS) from error
    if arguments.json:
        print(json.dumps(_as_dict(plan) | made))
        return
    print(_listing(plan))
    if arguments.dry_run:
        print("dry run: nothing was uploaded", file=sys.stderr)
    elif is_unchanged:
        print(f"\nnothing was uploaded: {made['url']} has the same files")
    else:
        deleted = f", deleted {', '.join(made['deleted'])}" if made["deleted"] else ""
        print(f"\n{made['url']} (commit {made['commit']}{deleted})")


def _as_dict(plan: PushPlan) -> dict[str, Any]:
    files = {name: file.size for name, file in plan.files.items()}
    about = {"repository": plan.repo_id, "kind": plan.kind, "size": plan.size}
    return about | {"files": files, "left_out": plan.left_out, "notes": plan.notes}


def _listing(plan: PushPlan) -> str:
    sizes = {name: f"{file.size:,}" for name, file in plan.files.items()}
    width = max(len(text) for text in [*sizes.values(), f"{plan.size:,}"])
    lines = [f"{plan.kind} for {plan.repo_id}, sizes in bytes:"]
    lines += [f"{size:>{width}}  {name}" for name, size in sizes.items()]
    lines += [f"{plan.size:>{width},}  in {len(sizes)} files"]
    if plan.left_out:
        lines += ["", f"not uploaded: {', '.join(plan.left_out)}"]
    lines += ["", *plan.notes] if plan.notes else []
    return "\n".join(lines)
