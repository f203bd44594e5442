"""What is taken for a secret and what is not: by name, by shape, by its value, and in an address."""

import difflib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.redact import HIDDEN, Redactor, known_secrets, redact, secret_name

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXkta2FuYXJ5\nQUFBQUI=\n-----END OPENSSH PRIVATE KEY-----"
SHAPES = {
    "hub": "hf_kanaryABCDEFGHIJKLMNOPQRSTUVWXYZ01",
    "OpenAI": "sk-kanary01abcdefghijklmnopqrstuvwxyz",
    "OpenAI project": "sk-proj-kanary01_abcdef-ghijklmnopqrstuvwxyz",
    "Anthropic": "sk-ant-api03-kanary0123456789abcdefghij",
    "OpenAI of letters": "sk-kanaryABCDEFGHIJKLMNOPQ",
    "OpenAI of small letters": "sk-kanaryabcdefghijklmnopqrstuvwxyz",
    "OpenAI project of letters": "sk-proj-kanaryABCDEFGHIJKLMNOPQ",
    "Google access": "ya29.a0kanary_0123456789-abcdefgh",
    "SendGrid": "SG.kanary0123456789abcdef.kanary-0123456789_abcdefghijklmnopqrstuvw",
    "Grafana": "glsa_kanary0123456789abcdefghijklmnop_0a1b2c3d",
    "Slack webhook": "https://hooks.slack.com/services/T0KANARY0/B0KANARY0/kanary0123456789abcdefgh",
    "Slack workflow": "https://hooks.slack.com/workflows/T0KANARY0/A0KANARY0/123456789012345678/kanary0123456789ab",
    "GitHub": "ghp_kanary0123456789abcdefghijABCDEFGHIJ",
    "GitHub app": "ghs_kanary0123456789abcdefghijABCDEFGHIJ",
    "GitHub fine": "github_pat_11KANARY0abcdefghijkl_mnopqrstuvwxyz0123456789",
    "GitLab": "glpat-kanary0123456789abcd",
    "AWS id": "AKIAKANARY0123456789",
    "AWS session": "ASIAKANARY0123456789",
    "Google": "AIzakanary0123456789abcdefghijABCDEFGHI",
    "Slack": "xoxb-123456789012-kanary0123456789",
    "npm": "npm_kanary0123456789abcdefghijABCDEFGHIJ",
    "PyPI": "pypi-AgEIcHlwaS5vcmckanary0123456789abcdef",
    "Stripe": "sk_live_kanary0123456789abcd",
    "Databricks": "dapi0123456789abcdef0123456789abcdef",
    "NVIDIA": "nvapi-kanary0123456789_abcdefghij-ABCDEFGHIJ",
    "Groq": "gsk_kanary0123456789abcdefghijABCDEFGHIJKLMNOPQRSTUV",
    "xAI": "xai-kanary0123456789abcdefghijABCDEFGHIJ",
    "Replicate": "r8_kanary0123456789abcdefghijABCDEFGHIJ",
    "Atlassian": "ATATT3xFfGF0kanary0123456789abcdef-ghij_ABCDEFGHIJ=0A1B2C3D",
    "Discord": "https://discord.com/api/webhooks/123456789012345678/kanary0123456789_abcdefghij-ABCDEFGHIJ",
    "Discord of old": "https://discordapp.com/api/v10/webhooks/123456789012345678/kanary0123456789abcdefghij",
    "Telegram": "123456789:AAkanary0123456789abcdefghij-ABCDE",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJrYW5hcnkifQ.kanary_s1gnature-0123456789",
    "PEM": PEM,
    "PEM escaped": PEM.replace("\n", "\\n"),
}
AROUND = ["{}", "before {} after", "x='{}'", '{{"x": "{}"}}', "value={}, next", "({})", "path/{}/x", "a\n{}\nb"]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_secret_is_known_by_its_shape(shape: str, around: str) -> None:
    secret = SHAPES[shape]
    redacted = redact(around.format(secret))
    assert redacted == around.format(HIDDEN)
    assert redact(redacted) == redacted


def test_a_key_that_was_cut_off_is_hidden_to_the_end() -> None:
    assert redact(f"before {PEM[:70]}") == "before ***"


NAMED = [
    ("Authorization: Bearer kanary", "Authorization: ***"),
    ("{'Authorization': 'Basic a2FuYXJ5OmthbmFyeQ=='}", "{'Authorization': '***'}"),
    ('"authorization": "kanary"', '"authorization": "***"'),
    ("curl -H 'Authorization: token kanary' https://x", "curl -H 'Authorization: ***' https://x"),
    ("sent bearer kanary0123456789abc and failed", "sent *** and failed"),
    ("X-Api-Key: kanary", "X-Api-Key: ***"),
    ("sent Basic bWU6a2FuYXJ5 and failed", "sent Basic *** and failed"),
    ("proxy: basic bWU6a2FuYXJ5cw==", "proxy: basic ***"),
    ("curl -u me:kanary https://x", "curl -u me:*** https://x"),
    ("curl --user='me:kan:ary' https://x", "curl --user='me:***' https://x"),
    ("['curl', '-u', 'me:kanary', 'https://x']", "['curl', '-u', 'me:***', 'https://x']"),
    ("Server=h;Uid=me;Pwd=kanary;Encrypt=yes", "Server=h;Uid=me;Pwd=***;Encrypt=yes"),
    ("DRIVER=x; UID=me; PWD={kan ary}", "DRIVER=x; UID=me; PWD=***"),
    ("'Pwd=kanary;Uid=me'", "'Pwd=***;Uid=me'"),
    ("password=kanary", "password=***"),
    ("PASSWORD: kanary, user: me", "PASSWORD: ***, user: me"),
    ("{'api_key': 'kanary', 'model': 'tiny'}", "{'api_key': '***', 'model': 'tiny'}"),
    ('{"apiKey":"kan\\"ary","x":1}', '{"apiKey":"***","x":1}'),
    ("{api_key:kanary,x:1}", "{api_key:***,x:1}"),
    ("+backend.options.token=kanary", "+backend.options.token=***"),
    ("backend.options.secret='kanary, and more'", "backend.options.secret='***'"),
    ("client_secret=b'kanary'", "client_secret=b'***'"),
    ("AccountKey=kanary==;EndpointSuffix=x", "AccountKey=***;EndpointSuffix=x"),
    ("--password kanary --x", "--password *** --x"),
    ("--hf-token=kanary", "--hf-token=***"),
    ("HF_TOKEN=kanary", "HF_TOKEN=***"),
    ("export MY_SECRET_THING=kanary kanary; x", "export MY_SECRET_THING=***"),
    ("A=1\nDB_PASS=kan,ary ;x\nB=2", "A=1\nDB_PASS=***\nB=2"),
    ("('AWS_SECRET_ACCESS_KEY', 'kan/ary')", "('AWS_SECRET_ACCESS_KEY', '***')"),
    (
        "environ({'OPENAI_API_KEY': 'kanary', 'HOME': '/root'})",
        "environ({'OPENAI_API_KEY': '***', 'HOME': '/root'})",
    ),
    ("http://user:kanary@host:5000/path", "http://***@host:5000/path"),
    ("https://kanary@host", "https://***@host"),
    ("postgresql://u:p@kanary@host/db", "postgresql://***@host/db"),
    ("http://u:a/kanary@host", "http://***@host"),
    ("at http://u:p@a/x: refused; mail me@b", "at http://***@a/x: refused; mail me@b"),
    ("http://a/?x=1&access_token=kanary&y=2 failed", "http://a/?x=1&access_token=***&y=2 failed"),
    ("pg://h/d?sslmode=on&PASSWORD=kanary", "pg://h/d?sslmode=on&PASSWORD=***"),
    (
        "'https://h/f?Policy=x&Signature=kanary~_&Key-Pair-Id=K' x",
        "'https://h/f?Policy=x&Signature=***&Key-Pair-Id=K' x",
    ),
    ("https://s3/x?X-Amz-Signature=kanary&X-Amz-Date=1", "https://s3/x?X-Amz-Signature=***&X-Amz-Date=1"),
    ("postgresql://h/d?sslmode=on&sslpassword=kanary&x=1", "postgresql://h/d?sslmode=on&sslpassword=***&x=1"),
    ("+backend.options.pwd=kanary --auth kanary", "+backend.options.pwd=*** --auth ***"),
    ("{'pwd': 'kanary', 'redis_auth': 'kanary'}", "{'pwd': '***', 'redis_auth': '***'}"),
    ("A=1\nSSHPASS=kanary\nKAGGLE_KEY=kanary\nB=2", "A=1\nSSHPASS=***\nKAGGLE_KEY=***\nB=2"),
    ("DBPASSWORD: kanary, REDIS_AUTH: kanary, x: y", "DBPASSWORD: ***, REDIS_AUTH: ***, x: y"),
    ("GITHUB_PAT=kanary", "GITHUB_PAT=***"),
    ("{'AZURE_DEVOPS_EXT_PAT': 'kanary', 'PATH': '/bin'}", "{'AZURE_DEVOPS_EXT_PAT': '***', 'PATH': '/bin'}"),
    ("A=1\nDB_PW=kan ary\nMY_JWT=kanary\nB=2", "A=1\nDB_PW=***\nMY_JWT=***\nB=2"),
    ("SESSION_COOKIE: kanary, TOKEN_HF=kanary", "SESSION_COOKIE: ***, TOKEN_HF=***"),
    ("api_key: |\n  kanary\nmodel: tiny", "api_key: ***\nmodel: tiny"),
    ("a:\n  password: >-\n    kanary\n\n    kanary\n  b: 1\n", "a:\n  password: ***\n  b: 1\n"),
    ("- token: |2-  # mine\n    kanary\n  b: 1", "- token: ***\n  b: 1"),
    ("  'secret': >+\r\n     kanary\r\n  b: 1", "  'secret': ***\r\n  b: 1"),
    ("INFO read hf_token: |\n  kanary\nINFO done", "INFO read hf_token: ***\nINFO done"),
    ("https://blob/x?sv=1&sig=kanary%3D", "https://blob/x?sv=1&sig=***"),
]


@pytest.mark.parametrize(("text", "redacted"), NAMED, ids=range(len(NAMED)))  # pytest puts an id into the environment
def test_a_secret_is_known_by_its_name_and_place(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted


ORDINARY = [
    "Qwen/Qwen2.5-7B-Instruct",
    "meta-llama/Llama-3.1-8B",
    "sqlite:////home/me/mlflow.db",
    "sqlite:////home/me@work/mlflow.db",
    "http://host:5000/?page=2",
    "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=rfloor&workflowType=machine_learning",
    "https://download.pytorch.org/whl/cu130",
    "file:///home/me/a@b/c",
    "s3://bucket/key/with/parts",
    "a basic building block, basic arithmetic, BASIC programs and Basic64 bm90aGluZw==",
    "basic bm90aGluZw== and basic functionality",
    "docker run -u 1000:1000 x; sort -u a; python -u http://host/x; git push -u origin main",
    "PWD=/root; OLDPWD=/tmp\nPWD=/work/tree; ls; pwd=$(pwd); cd ~",
    "sk-learn-pipelines-of-many-steps, task-sk-internationalization, sk-characterization",
    "SG.UE.64.STRONG, SG.90, HGMMA.64x128x16.F32.BF16 and ya29.x",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)",
    "https://hooks.slack.com/services and https://slack.com/apps/A0F7XDUAZ-incoming-webhooks",
    "/data//models@v2/llama/model-00001-of-00004.safetensors",
    "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/d149729398750b98c0af14eb82c78cfe92750796",
    "3f786850e387550fdab836ed7e6dc881de23001b",  # git
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # SHA-256
    "20260701-101010-abcd",
    "00c0ffee-1234-5678-9abc-def012345678",
    "GPU-5c89e2a1-1111-2222-3333-444455556666",
    "void marlin::Marlin<__nv_bfloat16, 43881, 256, 1, 8, 8, false, 4, 8, false>(int4 const*, int4 const*)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>, std::array<char*, 1ul> >",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
    "flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>",
    "aten::scaled_dot_product_attention x28, aten::mm x196",
    "triton_poi_fused__to_copy_add_cat_cos_mul_neg_sin_0",
    "model.layers.0.self_attn.k_proj.weight",
    "hf_attention.install(setup, capacity) of backends/hf_attention.py",
    "hf download Qwen/Qwen2.5-7B",
    "task-based scheduling, risk-averse-planning-of-2026",
    "sk-learn",
    "bytes_per_token_kv: 768",
    '"bytes_per_token_kv": 768, "tokens_per_s": 512.5, "usd_per_mtok": 0.5',
    "num_key_value_heads=8 max_new_tokens=64 eos_token_id=2 pad_token_id: null",
    "{'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'tokenizer_class': 'Qwen2Tokenizer'}",
    "KeyError: 'key'",
    "no key is called 'modle': did you mean model?",
    "PASS: 12 tests, KEY: x, TOKENS: 512, pass: all 3, auth: by name, pwd: here",
    "MAX_TOKENS=4096, CACHE_KEY=abcdef0123456789, tokens = prompt_tokens, keys = sorted(keys)",
    "key=value, cache_key=abcdef0123456789, sort_keys=True",
    "logits = self._forward(token[:, None])",
    "    token = logits.argmax(-1)",
    "decode_step(token=token)",
    "token: 1234",
    "next_token=151643",
    "password=None, token=null, secret: false",
    "tracking.password=${oc.env:MLFLOW_TRACKING_PASSWORD}",
    "notes: |\n  kanary\nb: >-\n  kanary",
    "| key | token: |\n| --- | --- |\n| a | b |",
    "PATH=/usr/bin:/bin PYTHONPATH=/x; pattern = pat; PAT=x; pw = 3; cookies: 5; NO_COOKIE=1; ENABLE_JWT=yes",
    "12345678:AAB, 20260701:AAA and 1234567890:abcdefghijklmnopqrstuvwxyz0123456789",
    "r8_fused_elementwise_kernels, xai-explainable-artificial-intelligence, gsk_a, nvapi-headers, ATATT",
    "https://discord.com/api/webhooks and https://discord.com/channels/123456789012345678/1",
    "PWD=/home/me/work",
    "OLDPWD=/home/me",
    "HF_TOKEN_PATH=/home/me/.cache/huggingface/token",
    "GOOGLE_APPLICATION_CREDENTIALS=/etc/passwd",
    "TOKENIZERS_PARALLELISM=false",
    "authorization failed: no such user",
    "the bearer of the news",
    "CUDA error: an illegal memory access was encountered",
    "mail me@example.org, see https://example.org/a",
    "MLflow is reached by sqlite://, postgresql://, mysql://, mssql://, http://, https://",
    "a password's / @ : # ? are written %2F %40 %3A %23 %3F",
    "eyJ",
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    "\x00\ud800 lone",
]


@pytest.mark.parametrize("text", ORDINARY, ids=range(len(ORDINARY)))
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert Redactor().plain({"x": [text]}) == {"x": [text]}


def test_the_repository_s_own_words_stay_as_they_are() -> None:
    """Sources, configuration and records: what rfloor's logs and records are made of."""
    root = Path(__file__).parent.parent
    files = [f for part in ("registry", "backends", "conf", "docs/results") for f in (root / part).rglob("*.*")]
    texts = [f for f in files if f.suffix in (".py", ".yaml", ".md", ".json") and f.name not in ("redact.py",)]
    assert len(texts) > 100
    changed = []
    for file in texts:
        kept = file.read_text(encoding="utf-8")
        redacted = redact(kept)
        if redacted != kept:
            lines = difflib.ndiff(kept.splitlines(), redacted.splitlines())
            changed += [f"{file.name}: {line}" for line in lines if line[0] in "-+"]
    assert changed == []


# By name


@pytest.mark.parametrize(
    "name",
    [
        *("password", "db_password", "passwd", "passphrase", "secret", "client_secret", "token", "hf_token"),
        *("api_key", "apikey", "apiKey", "X-Api-Key", "access_key", "private_key", "privateKey", "authorization"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"),
        *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "MYSQL_PWD", "DB_PASS"),
        *("KAGGLE_KEY", "SSHPASS", "AZURE_OPENAI_KEY", "REDIS_AUTH", "DBPASSWORD", "HF_TOKENS", "API_KEY_2", "AUTH"),
        *("pwd", "db_pwd", "db_pass", "dbpass", "sslpassword", "api_keys", "access_tokens", "passwords", "secrets"),
        *(
            "kaggle_key",
            "openai_key",
            "redis_auth",
            "auth",
            "mysecret",
            "backend.options.pwd",
            "X_AUTH",
            "DBKEY",
            "WEB_TOKEN",
        ),
        *(
            "GITHUB_PAT",
            "AZURE_DEVOPS_EXT_PAT",
            "DB_PW",
            "MY_JWT",
            "SESSION_COOKIE",
            "TOKEN_HF",
            "TOKEN_GITHUB",
            "jwt",
        ),
        *("github_pat", "githubPat", "db_pw", "session_cookie", "GH_PATS", "GITHUB_PAT_2", "auth_jwt"),
        *("credentials", "AccountKey", "backend.options.token", "github-token", "SECRET_THING", "accessToken"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert secret_name(name)
    assert Redactor().plain({name: "kanary"}) == {name: HIDDEN}
    assert Redactor().plain({name: ["kanary", {"a": 5}]}) == {name: HIDDEN}
    assert Redactor().plain({name: 123456}) == {name: HIDDEN}
    for nothing in (None, "", True, False):
        assert Redactor().plain({name: nothing}) == {name: nothing}


@pytest.mark.parametrize(
    "name",
    [
        *("tokens", "tokens_per_s", "bytes_per_token_kv", "eos_token", "bos_token", "pad_token_id", "tokenizer"),
        *("key", "keys", "cache_key", "num_key_value_heads", "k_proj", "passes", "pass", "compass", "HF_TOKEN_PATH"),
        *("password_file", "secret_name", "author", "authority", "SSH_AUTH_SOCK", "XAUTHORITY", "per_token", ""),
        *("usd_per_mtok", "max_new_tokens", "token_type_ids", "next_token", "secretary", "PWD", "monkey", "keyboard"),
        *("MONKEY", "BYPASS", "OLDPWD", "CACHE_KEY", "PUBLIC_KEY", "MAX_TOKENS", "prompt_tokens", "first_token"),
        *("key_heads", "kv_heads", "forward_pass", "sort_keys", "embed_tokens", "require_auth", "KEYS", "AUTHORS"),
        *(
            "PATH",
            "PYTHONPATH",
            "LD_LIBRARY_PATH",
            "PAT",
            "pat",
            "pattern",
            "pw",
            "SPAT",
            "cookie",
            "USE_COOKIE",
            "jwts",
        ),
        *("TOKEN_COUNT", "TOKEN_HIDDEN_SIZE", "token_hf_ids", "COOKIE_PATH", "JWT_FILE", "kilo_pw", "GITHUB_PATH"),
        *("sslkey", "STEPS_A_PASS", "backend.options.cache_key", "KEYMAP", "TOKENS_PER_S", "PASS"),
    ],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not secret_name(name)
    assert Redactor().plain({name: "kanary"}) == {name: "kanary"}


# By value


@pytest.mark.parametrize("form", ["{}", "x{}y", "'{}'", "[{}]", "\n{}\n"])
@pytest.mark.parametrize("value", ["kanary/with+odd=chars", 'kan"ary\\back', "kanary of words", "känary-1234567"])
def test_a_value_of_the_environment_s_secrets_is_hidden_in_all_its_spellings(
    monkeypatch: pytest.MonkeyPatch, value: str, form: str
) -> None:
    from urllib.parse import quote, quote_plus

    monkeypatch.setenv("SOME_TOKEN", value)
    spellings = [value, quote(value), quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]]
    spellings += [repr(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]]
    for spelt in spellings:
        assert redact(form.format(spelt)) == form.format(HIDDEN)
    assert redact(f"{value[:6]} {value[6:]}") == f"{value[:6]} {value[6:]}"


@pytest.mark.parametrize(
    "value", ["abcd", "12345", "hunter2", "swordfish", "opensesame", "12345678901", "hunterhunte", "p4ss_w0rd"]
)
def test_a_short_value_is_hidden_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_PASSWORD", value)
    for text in ("{}, and {}.", "x={}", "me:{}@host", "me%3A{}%40host", repr("a\n{}\tb"), "_{}_", "-{}-"):
        assert redact(text.format(value, value)) == text.format(HIDDEN, HIDDEN)
    assert redact(f"{value}2 and x{value}") == f"{value}2 and x{value}"


@pytest.mark.parametrize(
    "name",
    [
        *("KAGGLE_KEY", "SSHPASS", "AZURE_OPENAI_KEY", "REDIS_AUTH", "DBPASSWORD", "HF_TOKENS", "WANDB_KEYS"),
        *("KEY", "PASS", "AUTH", "TOKENS", "kaggle_key", "npm_config__auth"),
    ],
)
def test_a_secret_of_the_environment_is_known_by_more_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "kanary-1234")
    assert redact("told kanary-1234") == "told ***"


@pytest.mark.parametrize(
    "name", ["PWD", "OLDPWD", "MONKEY", "VLLM_MAX_NUM_BATCHED_TOKENS", "CACHE_KEY", "SSH_AUTH_SOCK"]
)
def test_what_a_variable_of_another_name_holds_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "kanary-1234")
    assert redact("told kanary-1234") == "told kanary-1234"


@pytest.mark.parametrize("value", ["", "x", "2048", "true", "Random", "password", "sdpa", "/etc/passwd", "rfloor"])
def test_an_ordinary_value_of_a_secret_s_variable_stays(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_TOKEN", value)
    text = f"rfloor: weights=random password true /etc/passwd {value} sdpa 2048"
    assert redact(text) == text


def test_a_file_of_a_password_s_name_makes_it_no_file_s_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swordfish").touch()
    monkeypatch.setenv("SOME_PASSWORD", "swordfish")
    assert redact("swordfish") == HIDDEN


def test_a_password_of_an_address_in_the_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:kanary%2F1@host/db")
    assert redact("tried kanary/1 and kanary%2F1 as me on host") == "tried *** and *** as me on host"


def test_what_a_configuration_keeps_secret_is_known() -> None:
    config = {
        "backend": {"options": {"api_key": "kanary-1", "size": 64, "more": [{"password": 12345678901234}]}},
        "tracking": {"uri": "https://me:kanary-2@host", "artifacts": "https://h/x?sslpassword=kanary-3"},
        "token": None,
    }
    assert known_secrets(config) == {"kanary-1", "12345678901234", "kanary-2", "kanary-3"}
    redactor = Redactor(known_secrets(config))
    assert redactor.text("kanary-1 kanary-2 kanary-3 12345678901234 64 me") == "*** *** *** *** 64 me"
    assert redactor.plain(config) == {
        "backend": {"options": {"api_key": HIDDEN, "size": 64, "more": [{"password": HIDDEN}]}},
        "tracking": {"uri": "https://***@host", "artifacts": "https://h/x?sslpassword=***"},
        "token": None,
    }


def test_a_password_that_is_a_field_s_name_costs_no_field() -> None:
    plain = Redactor(["metrics", "step_times_ms", "outcome"]).plain({"metrics": {"step_times_ms": "outcome"}})
    assert plain == {"metrics": {"step_times_ms": HIDDEN}}


def test_a_name_may_hold_a_secret_too() -> None:
    assert Redactor(["kanary-1"]).plain({"kernel kanary-1": {SHAPES["hub"]: 1}}) == {"kernel ***": {HIDDEN: 1}}


# Any text


@given(
    password=st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1),
    shape=st.sampled_from(
        ["http://user:<{}>@host/x", "postgresql+driver://<{}>@host", "failed: mysql://u:<{}>@h/d "]
    ),
)
def test_redact_leaves_nothing_of_any_password(password: str, shape: str) -> None:
    redacted = redact(shape.format(password))
    assert redacted == shape.replace(re.search(r"[^/]*<.*>", shape)[0], "***")


@given(text=st.text() | st.text("pasword=:'\"{}/@?& \n-_hfsk0123ABeyJ.", max_size=60))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


TEDIOUS = {
    "blocks": "password: |\n  a\n" * 60_000,
    "block": "password: |\n" + "  a\n" * 250_000,
    "indented": (" " * 999 + "password: |\n") * 1000,
    "digits": "1234567890" * 100_000,
    "patterns": "PAT=PW=JWT=COOKIE=" * 50_000,
    "slack": "hooks.slack.com/services/T" * 40_000,
    "pwd": ";pwd=a" * 150_000,
    "pwds": "pwd={" * 200_000,
    "user": "-u " + "a" * 1_000_000,
    "users": "-u " * 330_000,
    "basic": "basic " + "a" * 1_000_000,
    "basics": "basic " * 160_000,
    "sks": "sk-" + "a" * 1_000_000,
    "letters": "x" * 1_000_000,
    "slashes": "/" * 1_000_000,
    "addresses": "a://" * 250_000,
    "ats": "a://" + "@" * 1_000_000,
    "questions": "?" * 1_000_000,
    "parameters": "&a" * 500_000,
    "dashes": "-" * 1_000_000,
    "begins": "-----BEGIN PRIVATE KEY-----" * 40_000,
    "quotes": "a='" * 300_000,
    "backslashes": "password='" + "\\" * 1_000_000,
    "equals": "password=" * 110_000,
    "colons": "a:" * 500_000,
    "eyes": "eyJ" * 330_000,
    "dots": "eyJaaaaaaaa." * 80_000,
    "hf": "hf_" * 330_000,
    "sk": "sk-" * 330_000,
    "spaces": "password" + " " * 1_000_000,
    "bearers": "bearer " * 140_000,
    "lines": "HF_TOKEN=\n" * 100_000,
    "log": "2026-07-01 10:10:10 INFO step 12: 8.15 ms, kv=1024 (path=/a/b.py)\n" * 15_000,
}


@pytest.mark.parametrize("kind", TEDIOUS)
def test_no_text_takes_long(kind: str) -> None:
    """A megabyte in about a second on one core of 2026; a pattern that backtracks would take hours."""
    start = time.process_time()
    Redactor(["kanary-1"]).text(TEDIOUS[kind])
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "", [], {}, (1, "a"), {"a": None}])
def test_plain_values_come_back(value: Any) -> None:
    assert Redactor().plain(value) == value
