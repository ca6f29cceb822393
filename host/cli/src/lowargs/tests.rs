//! Command lines as users type them.

use clap::{CommandFactory, Parser};

use super::*;

fn parse(line: &str) -> Result<Command, clap::Error> {
    Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
}

fn run(line: &str) -> RunArgs {
    match parse(line).unwrap() {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_description_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn options_end_where_the_command_begins() {
    let args = run(
        "airlock run --image debian -it --timeout 2m -e A=1 -e B -w /tmp -u me:users -- ls -la --color",
    );
    assert_eq!(args.machine.image, "debian");
    assert!(args.exec.interactive && args.exec.tty);
    assert_eq!(args.exec.timeout, Some(Duration::from_secs(120)));
    assert_eq!(args.exec.env, ["A=1", "B"]);
    assert_eq!(args.command, ["ls", "-la", "--color"]);
    // Without the dashes, too: what follows the command is the command's.
    let args = run("airlock run echo --image -v -- x");
    assert_eq!(args.command, ["echo", "--image", "-v", "--", "x"]);
    assert_eq!(args.machine.image, "busybox");
}

#[test]
fn exec_takes_the_sandboxs_name_and_then_the_command() {
    let Command::Exec(args) = parse("airlock exec -it dev -- sh -c true").unwrap() else {
        panic!()
    };
    assert_eq!(args.name.as_str(), "dev");
    assert_eq!(args.command, ["sh", "-c", "true"]);
}

#[test]
fn sizes_counts_and_times_out_of_range_are_refused_with_the_range() {
    for (line, expected) in [
        ("airlock run --cpus 0 -- x", "possible are 1 to 32"),
        ("airlock run --cpus 33 -- x", "possible are 1 to 32"),
        ("airlock run --cpus 999 -- x", "is no number of CPUs"),
        // Not a riddle about unexpected arguments.
        ("airlock run --timeout -5s -- x", "is no time"),
        ("airlock run --memory -1M -- x", "is no size"),
        ("airlock run --memory 1M -- x", "1 MiB of memory asked for"),
        ("airlock run --memory much -- x", "is no size"),
        (
            "airlock run --memory 99999999T -- x",
            "more than any machine has",
        ),
        ("airlock run --scratch 1M -- x", "possible are 16M to 16T"),
        ("airlock run --timeout 0 -- x", "leaves no time"),
        ("airlock run --timeout 5d -- x", "is no time"),
        (
            "airlock run --timeout 99999999999999999999h -- x",
            "is no time",
        ),
        (
            "airlock run --engine xen -- x",
            "possible values: auto, kvm, qemu",
        ),
        ("airlock up Dev", "is no sandbox name"),
        ("airlock stop", "required"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn times_are_read_as_users_write_them() {
    for (text, ms) in [
        ("10", 10_000),
        ("10s", 10_000),
        ("500ms", 500),
        ("2m", 120_000),
        ("1h", 3_600_000),
    ] {
        assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
    }
}

fn exec(args: &[&str]) -> Result<ExecArgs, String> {
    let line = ["airlock", "exec"].iter().chain(args);
    match Cli::try_parse_from(line)
        .map_err(|error| error.to_string())?
        .command
    {
        Command::Exec(args) => Ok(*args),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_belongs_to_the_command_is_not_read_as_ours() {
    let args = exec(&["-d", "dev", "sh", "-c", "echo", "--json", "-d"]).unwrap();
    assert!(args.session.detach && !args.exec.json);
    assert_eq!(args.command, ["sh", "-c", "echo", "--json", "-d"]);
}

#[test]
fn attaching_takes_an_id_and_offsets_and_no_command() {
    let args = exec(&["--attach", "x-1", "--from", "7,9", "dev"]).unwrap();
    assert_eq!(args.session.attach.as_deref(), Some("x-1"));
    assert_eq!(args.session.from, Some([7, 9]));
    let args = exec(&["--attach", "x-1", "--from", "7", "dev"]).unwrap();
    assert_eq!(args.session.from, Some([7, 0]));
    for wrong in [
        &["--attach", "x-1", "dev", "true"][..],
        &["--attach", "x-1", "-d", "dev"],
        &["--attach", "x-1", "-t", "dev"],
        &["--attach", "x-1", "--from", "seven", "dev"],
        &["--from", "7", "dev", "true"],
        &["--replay", "17M", "dev", "true"],
        &["--limit", "disk=1", "dev", "true"],
    ] {
        exec(wrong).unwrap_err();
    }
}
