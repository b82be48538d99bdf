"""Files that are not what a command asks for, in one folder."""

import os


def write_bad_files(folder):
    for name in ("a-folder", "folder.yaml", "folder.json", "beside"):
        (folder / name).mkdir()
    for name in ("pipe", "pipe.yaml", "pipe.json", "beside/pipe.yaml"):
        os.mkfifo(folder / name)
    for name in ("loop", "loop.yaml", "loop.json", "beside/loop.yaml"):
        os.symlink(os.path.basename(name), folder / name)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


BASE = "defaults: [nash-m, _self_]\n"
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
CONTENTS = {
    "a-file": "text\n",
    "empty.yaml": "",
    "list.yaml": "- 1\n",
    "broken.yaml": "march: [\n",
    "binary.yaml": b"\xff\xfe\x00\x80",
    "circle.yaml": "defaults: [circle, _self_]\n",
    "deep.yaml": f"march: {'[' * 3000}{']' * 3000}\n",
    "large.yaml": "# " + "x" * 300_000 + "\n",
    "aliases.yaml": ALIASES,
    "unknown-key.yaml": f"{BASE}cost: {{clok_ghz: 1}}\n",
    "wrong-type.yaml": f"{BASE}cost: {{clock_ghz: fast}}\n",
    "negative.yaml": f"{BASE}cost: {{clock_ghz: -1}}\n",
    "nan.yaml": f"{BASE}cost: {{clock_ghz: .nan}}\n",
    "other-base.yaml": "defaults: [nash-x, _self_]\n",
    "march-list.yaml": f"{BASE}march: [a]\n",
    "rules-only.yaml": "march: my-npu\noe_version: '1.0'\nrules: {}\n",
    "other.yaml": f"{BASE}march: mine\n",
    "beside/good.yaml": BASE,
    "beside/binary.yaml": b"\xff",
    "empty.json": "",
    "list.json": "[1]",
    "binary.json": b"\xff\x00",
    "deep.json": "[" * 5000,
    "broken.zip": b"PK\x03\x04xx",
    "binary.csv": b"\xff\x00\x80",
    "empty.csv": "",
    "header.csv": "model,dtype\n",
}
