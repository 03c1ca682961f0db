from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from holdfast.training.errors import InputError, StorageError
from holdfast.training.storage.credentials import found_credentials, region

KEYS = "aws_access_key_id = {0}\naws_secret_access_key = secret-of-{0}\n"
PROCESS = "import json; print(json.dumps({'Version': 1, 'AccessKeyId': 'of-a-program', "
PROCESS += "'SecretAccessKey': 's', 'SessionToken': 't'}))"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without credentials, in an environment without any."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path


def write(home: Path, *, credentials: str = "", config: str = "") -> None:
    (home / ".aws" / "credentials").write_text(credentials)
    (home / ".aws" / "config").write_text(config)


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ({}, {}, None),
        ({"config": "[default]\nregion = eu-central-1\n"}, {}, None),
        ({"credentials": "[default]\n" + KEYS.format("a")}, {}, "a"),
        ({"config": "[default]\n" + KEYS.format("a")}, {}, "a"),
        (
            {
                "credentials": "[default]\n" + KEYS.format("a"),
                "config": "[default]\n" + KEYS.format("b"),
            },
            {},
            "a",
        ),
        (
            {"credentials": f"[default]\n{KEYS.format('a')}[team]\n{KEYS.format('t')}"},
            {"AWS_PROFILE": "team"},
            "t",
        ),
        ({"config": f"[profile team]\n{KEYS.format('t')}"}, {"AWS_DEFAULT_PROFILE": "team"}, "t"),
        ({"credentials": "[default]\n" + KEYS.format("a")}, {"AWS_ACCESS_KEY_ID": "e"}, None),
        (
            {"credentials": "[default]\n" + KEYS.format("a")},
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"},
            None,
        ),
        (
            {"credentials": "[team]\n" + KEYS.format("t")},
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", "AWS_PROFILE": "team"},
            "t",
        ),
    ],
)
def test_a_profile_is_found_where_the_clouds_own_tools_find_it(
    files: dict[str, str],
    environment: dict[str, str],
    expected: str | None,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(home, **files)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = found_credentials("s3")
    assert (None if found is None else found()["access_key_id"]) == expected


def test_files_may_lie_elsewhere_and_name_the_region(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "keys").write_text(f"[team]\n{KEYS.format('t')}aws_session_token = of-t\n")
    (home / "settings").write_text("[profile team]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "settings"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    found = found_credentials("s3")
    assert found is not None
    assert found()["token"] == "of-t"
    assert region() == "eu-central-1"


def test_what_is_written_into_the_file_meanwhile_counts(home: Path) -> None:
    write(home, credentials="[default]\n" + KEYS.format("old"))
    found = found_credentials("s3")
    assert found is not None
    write(home, credentials="[default]\n" + KEYS.format("new"))
    assert found()["access_key_id"] == "new"
    write(home)
    with pytest.raises(StorageError, match="has no keys any more"):
        found()
    assert "write them there again" in found.problem
    write(home, credentials="[default]\n" + KEYS.format("newer"))
    assert (found()["access_key_id"], found.problem) == ("newer", "")


def test_a_program_that_a_profile_names_is_asked_and_its_failure_repeats_no_secret(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3", reason="the extra 'aws' is not installed")
    program = home / "program.py"
    program.write_text(PROCESS)
    write(home, config=f"[default]\ncredential_process = {sys.executable} {program}\n")
    found = found_credentials("s3")
    assert found is not None
    assert found()["access_key_id"] == "of-a-program"
    program.write_text("import sys; sys.exit('hunter2')")
    again = found_credentials("s3")
    assert again is not None
    with pytest.raises(StorageError, match="gives no credentials") as failed:
        again()
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize(
    ("files", "profile", "expected"),
    [
        ({}, "team", "AWS_PROFILE names 'team', which is not in"),
        ({"credentials": "no section\n"}, "", "is no file of AWS profiles"),
    ],
)
def test_a_wrong_profile_is_one_line(
    files: dict[str, str],
    profile: str,
    expected: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(home, **files)
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(InputError, match=expected) as failed:
        found_credentials("s3")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"), [("s3", "boto3.session", "aws"), ("gs", "google.auth", "gcp")]
)
def test_who_has_to_be_asked_through_an_extra_is_told_how_to_install_it(
    scheme: str, module: str, extra: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home, config="[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = y\n")
    path = home / ".config" / "gcloud" / "application_default_credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"type": "external_account"}))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'holdfast\[{extra}\]'"):
        found_credentials(scheme)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"type": "service_account"}', '{"type": "authorized_user"}']
)
def test_what_obstore_reads_of_google_is_left_to_it(content: str, home: Path) -> None:
    path = home / ".config" / "gcloud" / "application_default_credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert found_credentials("gs") is None
    assert found_credentials("az") is None
