"""Credentials that obstore does not find by itself, found as the clouds' own tools find them.

Obstore finds those of the environment, a web identity, a pod and a machine, and renews them. Here
are a profile of ``~/.aws`` and Google's federated accounts. What is found is asked for again
every minute: whoever renews it in its file helps the run that waits for it.
"""

from __future__ import annotations

import configparser
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from holdfast.training.errors import HoldfastError, InputError, StorageError

Found = dict[str, Any]
ASKED_AGAIN_S = 60.0
OBSTORE_MARGIN_S = 300.0
"""So long before they end obstore asks for new ones."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
KEYS = ("aws_access_key_id", "aws_secret_access_key")
ASKED_OF_OTHERS = ("role_arn", "sso_session", "sso_start_url", "credential_process")
"""Keys of a profile whose credentials somebody else has."""
OBSTORE_READS = ("service_account", "authorized_user")
GOOGLE_NAMED = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
)
GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


class Credentials:
    """What obstore calls for credentials, again and again.

    Attributes:
        problem: why there were none the last time, without a secret; empty where there were some.
    """

    def __init__(self, fetch: Callable[[], Found]) -> None:
        """``fetch`` raises HoldfastError where it has none."""
        self.problem = ""
        self._fetch = fetch

    def __call__(self) -> Found:
        """As obstore wants them. Raises HoldfastError, which obstore wraps in one of its own."""
        try:
            found = self._fetch()
        except HoldfastError as error:
            self.problem = str(error)
            raise
        self.problem = ""
        return found


def found_credentials(scheme: str) -> Credentials | None:
    """The credentials for a kind of store; None where obstore is to look for them itself.

    Raises InputError for a profile that is not there, or one that needs an extra that is not.
    """
    finders = {"s3": _aws_credentials, "gs": _google_credentials}
    return finders[scheme]() if scheme in finders else None


def region() -> str:
    """The region of AWS that the environment or the profile names; empty where neither does."""
    named = first_named(REGIONS)
    return named or _profile(_profile_name() or "default").get("region", "")


def endpoint() -> str:
    """The server of S3 that was named by hand; empty for Amazon's own."""
    return first_named(ENDPOINTS)


def first_named(names: Iterable[str]) -> str:
    """The first of these variables of the environment that has a value; empty for none."""
    return next(filter(None, (os.environ.get(name, "") for name in names)), "")


def _aws_credentials() -> Credentials | None:
    name = _profile_name()
    is_named_otherwise = "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ and not name
    if os.environ.get("AWS_ACCESS_KEY_ID") or is_named_otherwise:
        return None
    profile = _profile(name or "default")
    if name and not profile:
        files = " nor in ".join(map(str, _profile_files()))
        raise InputError(f"AWS_PROFILE names {name[:80]!r}, which is not in {files}; correct it")
    if _has_keys(profile):
        return Credentials(lambda: _keys_of(name or "default"))
    if any(key in profile for key in ASKED_OF_OTHERS):
        session = required_module("boto3.session", "aws", f"the AWS profile {name or 'default'!r}")
        return Credentials(_Asking(session.Session, name or "default").fetch)
    return None


def _profile_name() -> str:
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or ""


def _profile_files() -> tuple[Path, Path]:
    folder = Path("~/.aws")
    named = os.environ.get("AWS_SHARED_CREDENTIALS_FILE"), os.environ.get("AWS_CONFIG_FILE")
    return (
        Path(named[0] or folder / "credentials").expanduser(),
        Path(named[1] or folder / "config").expanduser(),
    )


def _profile(name: str) -> Mapping[str, str]:
    """What both files say of a profile; the file of credentials comes first."""
    credentials, config = _profile_files()
    of_config = name if name == "default" else f"profile {name}"
    return {**_section(config, of_config), **_section(credentials, name)}


def _section(path: Path, name: str) -> Mapping[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; correct its permissions"
        ) from error
    except (configparser.Error, UnicodeDecodeError):  # whose words repeat what stands in it
        raise InputError(f"{path} is no file of AWS profiles; correct it") from None
    return dict(parser[name]) if parser.has_section(name) else {}


def _has_keys(profile: Mapping[str, str]) -> bool:
    return all(profile.get(key) for key in KEYS) and "role_arn" not in profile


def _keys_of(name: str) -> Found:
    profile = _profile(name)
    if not _has_keys(profile):
        raise StorageError(f"the AWS profile {name!r} has no keys any more; write them there again")
    key, secret = (profile[name] for name in KEYS)
    return _found(key, secret, profile.get("aws_session_token") or None)


def _found(key: str, secret: str, token: str | None) -> Found:
    ends_at = datetime.now(UTC) + timedelta(seconds=OBSTORE_MARGIN_S + ASKED_AGAIN_S)
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": token,
        "expires_at": ends_at,
    }


class _Asking:
    """A profile whose credentials a role, a single sign-on or a program has: boto3 asks."""

    def __init__(self, new_session: Callable[..., Any], name: str) -> None:
        self._new_session, self._name = new_session, name
        self._credentials: Any = None

    def fetch(self) -> Found:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if self._credentials is None:
                self._credentials = self._new_session(profile_name=self._name).get_credentials()
            frozen = self._credentials.get_frozen_credentials()  # new ones before these end
        except (BotoCoreError, ClientError) as error:
            self._credentials = None  # whoever signs in again writes new files
            raise StorageError(
                f"the AWS profile {self._name!r} gives no credentials ({type(error).__name__}); "
                f"renew them, as with aws sso login, and go on"
            ) from error
        return _found(frozen.access_key, frozen.secret_key, frozen.token)


def _google_credentials() -> Credentials | None:
    if any(os.environ.get(name) for name in GOOGLE_NAMED):
        return None
    folder = Path(os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud")
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    path = Path(named or folder / "application_default_credentials.json").expanduser()
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("type")
    except (OSError, ValueError, AttributeError):
        return None  # obstore says what is wrong with it, or asks the machine
    if kind in OBSTORE_READS:
        return None
    auth = required_module("google.auth", "gcp", f"{path} is of type {str(kind)[:40]!r}, which")
    transport = required_module("google.auth.transport.requests", "gcp", "such an account")
    return Credentials(_Federated(auth, transport.Request(), path).fetch)


class _Federated:
    """An account that another provider of identities vouches for: google-auth asks."""

    def __init__(self, auth: Any, request: Any, path: Path) -> None:
        self._auth, self._request, self._path = auth, request, path

    def fetch(self) -> Found:
        try:
            found = self._loaded()
            found.refresh(self._request)
        except (self._auth.exceptions.GoogleAuthError, OSError) as error:
            raise StorageError(
                f"{self._path} gives no credentials ({type(error).__name__}); renew what it names, "
                f"and go on"
            ) from error
        return {"token": found.token, "expires_at": found.expiry.replace(tzinfo=UTC)}

    def _loaded(self) -> Any:
        identity_pool: Any = importlib.import_module("google.auth.identity_pool")
        try:  # the other way asks for the name of the project, too, which nobody needs
            return identity_pool.Credentials.from_file(str(self._path), scopes=[GOOGLE_SCOPE])
        except ValueError:
            return self._auth.load_credentials_from_file(str(self._path), scopes=[GOOGLE_SCOPE])[0]


def required_module(module: str, extra: str, what: str) -> Any:
    """A module of an extra. Raises InputError, which begins with ``what``, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        needed = error.name or module
        raise InputError(
            f"{what} needs {needed}, which is not installed: pip install 'holdfast[{extra}]'"
        ) from None
