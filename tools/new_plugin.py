"""Start a contrib plugin from contrib/_template.

python tools/new_plugin.py SLUG ClassName "Title of the paper (arXiv 2501.00001)"
"""

from __future__ import annotations

import re
import sys

import generate


def main() -> None:
    """Fill contrib/_template into contrib/SLUG; a file that is already there stays as it is."""
    if len(sys.argv) != 4 or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", sys.argv[1]):
        raise SystemExit(__doc__)
    slug, class_name, description = sys.argv[1:]
    name = slug.replace("-", "_")
    values = {
        "name": name,
        "slug": slug,
        "class_name": class_name,
        "description": description,
        "module": f"rlplugins_{name}",
        "version": generate.project(generate.ROOT)["version"],
    }

    def filled(text: str) -> str:
        return re.sub(r"\{(slug|name|class_name|description|module|version)\}", lambda key: values[key[1]], text)

    template = generate.ROOT / "contrib" / "_template"
    for source in sorted(file for file in template.rglob("*") if file.is_file()):
        target = generate.ROOT / "contrib" / slug / filled(str(source.relative_to(template)))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(filled(source.read_text()))
            print(f"wrote {target.relative_to(generate.ROOT)}")
    print("now: make setup, and make docs once it has a hook")


if __name__ == "__main__":
    main()
