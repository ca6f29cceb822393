//! What typed arguments and an image's defaults become.

use clap::Parser;

use super::*;
use crate::lowargs::{Cli, Command as Typed};

fn execution_of(line: &str, defaults: &Defaults) -> anyhow::Result<Execution> {
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let Typed::Run(args) = cli.command else {
        panic!()
    };
    let env_files = check_early(&args.exec, &args.command, false)?;
    execution(
        args.exec,
        env_files,
        args.command,
        &SessionOptions::default(),
        defaults,
    )
}

fn defaults() -> Defaults {
    Defaults {
        env: [("PATH", "/bin"), ("LANG", "C")]
            .map(|(n, v)| (n.to_owned(), v.to_owned()))
            .into(),
        cwd: "/srv".to_owned(),
        user: "nobody".to_owned(),
        shell: "/bin/sh".to_owned(),
    }
}

fn start_of(execution: &Execution) -> &airlock_sandbox::client::proto::v1::ExecStart {
    match &execution.what {
        What::Start(command) => command.start(),
        other => panic!("{other:?}"),
    }
}

fn env_of(execution: &Execution) -> Vec<String> {
    let start = start_of(execution);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    start
        .env
        .iter()
        .map(|v| format!("{}={}", text(&v.name), text(&v.value)))
        .collect()
}

#[test]
fn the_image_says_what_the_user_does_not() {
    let plain = execution_of("airlock run -- true", &defaults()).unwrap();
    assert_eq!(env_of(&plain), ["LANG=C", "PATH=/bin"]);
    assert_eq!(start_of(&plain).cwd, "/srv");
    assert_eq!(start_of(&plain).user, "nobody");
    assert!(start_of(&plain).tty.is_none());
    let typed = execution_of("airlock run -e PATH=/x=y -u root -w / -- true", &defaults()).unwrap();
    assert_eq!(env_of(&typed), ["LANG=C", "PATH=/x=y"]);
    assert_eq!(start_of(&typed).cwd, "/");
    assert_eq!(start_of(&typed).user, "root");
}

#[test]
fn a_variable_without_a_value_is_passed_on_or_taken_away() {
    let inherited = std::env::var("PATH").unwrap();
    let passed = execution_of(
        "airlock run -e PATH -e LANG= -e AIRLOCK_TEST_UNSET -- true",
        &defaults(),
    )
    .unwrap();
    assert_eq!(
        env_of(&passed),
        ["LANG=".to_owned(), format!("PATH={inherited}")]
    );
    assert!(execution_of("airlock run -e =x -- true", &defaults()).is_err());
}

#[test]
fn an_env_file_is_read_line_by_line_and_e_wins_over_it() {
    let file = std::env::temp_dir().join(format!("airlock-env-{}", std::process::id()));
    std::fs::write(&file, "# comment\n\nA=1 2\r\nB=#x\n").unwrap();
    let line = format!("airlock run --env-file {} -e B=b -- true", file.display());
    let found = execution_of(&line, &Defaults::default()).map(|execution| env_of(&execution));
    std::fs::write(&file, "A=1\nwrong line\n").unwrap();
    let error = execution_of(&line, &Defaults::default())
        .unwrap_err()
        .to_string();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(found.unwrap(), ["A=1 2", "B=b"]);
    assert!(error.ends_with("line 2: NAME=VALUE is expected"), "{error}");
}

#[test]
fn an_endless_env_file_is_refused_and_not_read_for_ever() {
    let error = execution_of(
        "airlock run --env-file /dev/zero -- true",
        &Defaults::default(),
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains("/dev/zero is no file of variables"),
        "{error}"
    );
}

#[test]
fn an_empty_user_is_not_taken_for_root() {
    let cli = Cli::try_parse_from(["airlock", "run", "-u", "", "--", "true"]).unwrap();
    let Typed::Run(args) = cli.command else {
        panic!()
    };
    let error = check_early(&args.exec, &args.command, false).unwrap_err();
    assert!(error.to_string().starts_with("-u names no user"), "{error}");
}

#[test]
fn without_a_command_a_terminal_gets_the_images_shell() {
    let shell = execution_of("airlock run -t", &defaults()).unwrap();
    assert_eq!(start_of(&shell).argv, ["/bin/sh"]);
    assert!(start_of(&shell).tty.is_some());
    assert!(execution_of("airlock run -t", &Defaults::default()).is_err());
    let cli = Cli::try_parse_from(["airlock", "run"]).unwrap();
    let Typed::Run(args) = cli.command else {
        panic!()
    };
    let error = check_early(&args.exec, &args.command, false)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("no command given"), "{error}");
}

#[test]
fn a_relative_working_directory_is_refused_before_anything_boots() {
    let cli = Cli::try_parse_from(["airlock", "run", "-w", "src", "--", "true"]).unwrap();
    let Typed::Run(args) = cli.command else {
        panic!()
    };
    let error = check_early(&args.exec, &args.command, false)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "the working directory src is not an absolute path");
}
