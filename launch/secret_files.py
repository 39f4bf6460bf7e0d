"""What looks like a secret: by the name of a file or variable, and by its content.

Everyone on a cluster can read a job's files, environment and command line.
"""

from __future__ import annotations

import re
import zipfile
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import IO

_DIRECTORIES = frozenset(
    {".ssh", ".aws", ".azure", ".gcloud", ".gnupg", ".kube", ".docker", ".huggingface", ".vault"}
    | {"gcloud", "secrets", ".secrets"}
)
_FILES = (
    "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "id_*_sk", "*.pem", "*.key", "*.p12", "*.pfx",
    "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.gpg", ".env", ".env.*", "*.env", ".envrc",
    ".netrc", "_netrc", ".pgpass", ".my.cnf", ".npmrc", ".pypirc", ".htpasswd", ".dockercfg",
    ".git-credentials", ".s3cfg", ".boto", ".rclone.conf", "rclone.conf", ".vault-token",
    "kubeconfig", "kubeconfig.*", "*.kubeconfig", "client_secret*.json", "service_account*.json",
    "service-account*.json", "application_default_credentials.json", "auth.json", "*.tfstate",
    "*.tfvars", ".databrickscfg", ".cdsapirc", ".kaggle.json", "kaggle.json",
)  # fmt: skip
_STEM = re.compile(
    r"(^|[._-])(token|secrets?|passw(or)?ds?|passphrase|credentials?|api[_-]?keys?|private[_-]?key"
    r"|access[_-]?key)$",
    re.IGNORECASE,
)
_PLAIN_ENDINGS = ("", ".txt", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".csv")
"""Files that hold values; `token.py` is code."""

_CONTENTS = {
    "a private key": (
        rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-\d"
        rb"|AGE-SECRET-KEY-1[0-9A-Z]{20}|client-key-data:"
    ),
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an API key (sk-...)": rb"(?<![\w-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "an AWS key": rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}",
    "a Slack token": rb"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",
    "a package registry's token": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[\w-]{20,}",
    "a JSON web token": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
}
_CONTENT = {name: re.compile(pattern) for name, pattern in _CONTENTS.items()}
_URL_PASSWORD = re.compile(rb"[a-z+]+://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
_PIECE = 1 << 20
_OVERLAP = 4096

_WORDS = frozenset(
    {"PASS", "PASSWD", "PASSWORD", "PASSPHRASE", "PWD", "PW", "KEY", "KEYS", "TOKEN", "TOKENS"}
    | {"SECRET", "SECRETS", "CREDENTIAL", "CREDENTIALS", "CREDS", "AUTH", "PAT", "JWT", "DSN"}
    | {"COOKIE", "BEARER", "WEBHOOK", "NETRC"}
)
_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASS", "PASSWD", "PASSWORD", "PASSPHRASE", "JWT")
_DATABASE = re.compile(
    r"(DATABASE|DB|POSTGRES|POSTGRESQL|PG|MYSQL|MONGO|MONGODB|REDIS|AMQP|BROKER|SQLALCHEMY)"
    r"\w*_?(URL|URI)$|CONN(ECTION)?_?STR(ING)?",
    re.IGNORECASE,
)


def variable_problem(name: str, value: str) -> str:
    """Return why an environment variable looks like a secret; empty where it does not."""
    words = re.split(r"[^A-Z]+", name.upper())
    if _WORDS.intersection(words) or any(word.endswith(_ENDINGS) for word in words):
        return "its name is one of a secret"
    if _DATABASE.search(name):
        return "such addresses have a password in them"
    return text_problem(value.encode(errors="replace"), urls=True)


def text_problem(text: bytes, *, urls: bool = False) -> str:
    """Return what a text contains that looks like a secret; `urls`: also passwords in addresses."""
    for name, pattern in _CONTENT.items():
        if pattern.search(text):
            return f"it contains {name}"
    return "it contains a password" if urls and _URL_PASSWORD.search(text) else ""


def name_problem(path: str) -> str:
    """Return why a file's path looks like one of a secret; empty where it does not."""
    parts = PurePosixPath(path).parts
    for parent in parts[:-1]:
        if parent.lower() in _DIRECTORIES:
            return f"it is in {parent}"
    lower = parts[-1].lower()
    stems = [lower.removesuffix(ending) for ending in _PLAIN_ENDINGS if lower.endswith(ending)]
    is_plain = any(map(_STEM.search, stems))
    if is_plain or any(fnmatch(lower, pattern) for pattern in _FILES):
        return "its name is one of a secret"
    return ""


def secrets_in(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return the files of an archive that look like secrets, and why."""
    problems = {}
    for entry in archive.infolist():
        if entry.is_dir():
            continue
        problem = name_problem(entry.filename)
        if not problem:
            with archive.open(entry) as file:
                problem = _content_problem(file)
        if problem:
            problems[entry.filename] = problem
    return problems


def _content_problem(file: IO[bytes]) -> str:
    """Search a file in pieces that overlap."""
    tail = b""
    while piece := file.read(_PIECE):
        if problem := text_problem(tail + piece):
            return problem
        tail = piece[-_OVERLAP:]
    return ""
