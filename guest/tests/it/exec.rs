//! What an exec is started with: arguments, environment, folder, user, limits; and what is said when it cannot be.

use airlock_proto::v1::{ExecStart, Rlimit, SpawnStage};

use crate::client::{Agent, exec, is_root, me, sh, variable};

fn stage(agent: &Agent, request: ExecStart) -> (SpawnStage, i32) {
    let failed = agent.client().run(request).failed.expect("a spawn failure");
    assert!(!failed.message.is_empty() && !failed.message.contains('\n'));
    (failed.stage(), failed.errno)
}

#[test]
fn output_exit_code_and_both_streams_arrive() {
    let agent = Agent::start();
    let report = agent.client().run(sh("echo out; echo err >&2; exit 7"));
    assert_eq!(
        (report.stdout(), report.stderr()),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(report.code(), 7);
    assert!(report.tree.is_some());
    assert!(
        report
            .ends
            .iter()
            .all(|end| end.total_bytes == 4 && end.cut_bytes == 0)
    );
}

#[test]
fn a_connection_serves_one_exec_after_another() {
    let agent = Agent::start();
    let mut client = agent.client();
    for code in 0..50 {
        assert_eq!(client.run(sh(&format!("exit {code}"))).code(), code);
    }
}

#[test]
fn arguments_reach_the_program_as_they_are() {
    let agent = Agent::start();
    let report = agent.client().run(exec(&[
        "/usr/bin/printf",
        "%s|",
        "a b",
        "",
        "$HOME",
        "*",
        "é",
    ]));
    assert_eq!(report.stdout(), "a b||$HOME|*|é|");
}

#[test]
fn the_environment_is_what_was_asked_for() {
    let agent = Agent::start();
    let mut request = exec(&["/usr/bin/env"]);
    request.env_clear = true;
    request.env = vec![variable("A", "1 2"), variable("B", "")];
    let report = agent.client().run(request);
    assert_eq!(report.stdout(), "A=1 2\nB=\n");
    let report = agent.client().run(exec(&["env"]));
    for name in ["PATH=", "HOME=", "USER=", "LOGNAME=", "SHELL="] {
        assert!(
            report.stdout().lines().any(|l| l.starts_with(name)),
            "{name}"
        );
    }
    assert!(!report.stdout().contains("TERM="), "no terminal, no TERM");
}

#[test]
fn a_program_is_found_in_the_execs_own_path() {
    let agent = Agent::start();
    let tool = agent.folder().join("tool");
    std::fs::write(&tool, "#!/bin/sh\necho found\n").unwrap();
    let mut request = exec(&["tool"]);
    request.env = vec![variable("PATH", agent.folder().to_str().unwrap())];
    assert_eq!(
        stage(&agent, request.clone()),
        (SpawnStage::SpawnLookup, libc::EACCES)
    );
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&tool, mode).unwrap();
    request.id += "again";
    assert_eq!(agent.client().run(request).stdout(), "found\n");
}

#[test]
fn the_working_directory_is_entered_or_named_in_the_error() {
    let agent = Agent::start();
    let mut request = exec(&["pwd"]);
    request.cwd = "/usr".into();
    assert_eq!(agent.client().run(request).stdout(), "/usr\n");
    let mut request = exec(&["pwd"]);
    request.cwd = "/no/such".into();
    assert_eq!(stage(&agent, request), (SpawnStage::SpawnCwd, libc::ENOENT));
    let mut request = exec(&["pwd"]);
    request.cwd = "/bin/sh".into();
    assert_eq!(
        stage(&agent, request),
        (SpawnStage::SpawnCwd, libc::ENOTDIR)
    );
}

#[test]
fn law_10_spawn_errors_name_stage_and_errno() {
    let agent = Agent::start();
    assert_eq!(
        stage(&agent, exec(&["no-such-program"])),
        (SpawnStage::SpawnLookup, libc::ENOENT)
    );
    assert_eq!(
        stage(&agent, exec(&["/no/such"])),
        (SpawnStage::SpawnLookup, libc::ENOENT)
    );
    assert_eq!(
        stage(&agent, exec(&["/etc"])),
        (SpawnStage::SpawnLookup, libc::EACCES)
    );
    assert_eq!(
        stage(&agent, exec(&["/etc/passwd"])),
        (SpawnStage::SpawnLookup, libc::EACCES)
    );
    let mut request = exec(&["true"]);
    request.user = "no-such-user".into();
    assert_eq!(stage(&agent, request).0, SpawnStage::SpawnUser);
    assert_eq!(stage(&agent, exec(&[])).0, SpawnStage::SpawnRequest);
    let mut request = exec(&["true"]);
    request.id = "../etc".into();
    assert_eq!(stage(&agent, request).0, SpawnStage::SpawnRequest);
}

#[test]
fn a_script_whose_interpreter_is_missing_is_not_called_missing_itself() {
    let agent = Agent::start();
    let tool = agent.folder().join("tool");
    std::fs::write(&tool, "#!/no/such/interpreter\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&tool, mode).unwrap();
    let path = tool.to_str().unwrap();
    assert_eq!(
        stage(&agent, exec(&[path])),
        (SpawnStage::SpawnExec, libc::ENOENT)
    );
    std::fs::write(&tool, "echo no interpreter line\n").unwrap();
    assert_eq!(
        stage(&agent, exec(&[path])),
        (SpawnStage::SpawnExec, libc::ENOEXEC)
    );
}

#[test]
fn a_user_brings_its_ids_and_its_own_stdout() {
    let agent = Agent::start();
    if !is_root() {
        // Without root the only user there can be is our own, and another one is an error.
        let mut request = exec(&["id"]);
        request.user = "0:0".into();
        assert_eq!(stage(&agent, request).0, SpawnStage::SpawnCredentials);
        return;
    }
    let mut request = sh("id -u; id -g; id -G; echo again > /dev/stdout; umask");
    request.user = "1234:99".into();
    request.extra_gids = vec![7];
    request.umask = Some(0o077);
    let report = agent.client().run(request);
    assert_eq!(
        report.stdout(),
        "1234\n99\n99 7\nagain\n0077\n",
        "{}",
        report.stderr()
    );
    let mut request = sh("id -un; echo $HOME");
    request.user = "nobody".into();
    assert_eq!(
        agent.client().run(request).stdout(),
        "nobody\n/nonexistent\n"
    );
}

#[test]
fn nothing_of_the_agents_leaks_into_an_exec() {
    let agent = Agent::start();
    let script = "ls /proc/self/fd; grep -E '^(Sig(Blk|Ign|Cgt)|NoNewPrivs)' /proc/self/status; cat /proc/self/oom_score_adj";
    let report = agent.client().run(exec(&["/bin/bash", "-c", script]));
    // Descriptor 3 is the one that ls reads the folder with.
    assert!(
        report.stdout().starts_with("0\n1\n2\n3\n"),
        "{}",
        report.stdout()
    );
    let zeros = "\t0000000000000000\n";
    assert!(
        report.stdout().contains(&format!("SigBlk:{zeros}")),
        "{}",
        report.stdout()
    );
    assert!(
        report.stdout().contains(&format!("SigIgn:{zeros}")),
        "{}",
        report.stdout()
    );
}

#[test]
fn an_exec_leads_a_session_of_its_own() {
    let agent = Agent::start();
    let report = agent
        .client()
        .run(sh("cut -d' ' -f1,5,6 /proc/$$/stat; echo $$"));
    let out = report.stdout();
    let numbers: Vec<_> = out.split_whitespace().collect();
    assert!(numbers.iter().all(|n| *n == numbers[0]), "{numbers:?}");
    assert_eq!(numbers[0], report.started.unwrap().pid.to_string());
}

#[test]
fn limits_and_no_new_privs_are_in_force() {
    let agent = Agent::start();
    let mut request = sh("ulimit -n; ulimit -f; grep NoNewPrivs /proc/self/status; nice");
    request.rlimits = vec![
        Rlimit {
            resource: libc::RLIMIT_NOFILE,
            soft: 99,
            hard: 100,
        },
        Rlimit {
            resource: libc::RLIMIT_FSIZE,
            soft: 512 * 5,
            hard: 512 * 5,
        },
    ];
    request.no_new_privs = true;
    request.nice = Some(5);
    let report = agent.client().run(request);
    assert_eq!(
        report.stdout(),
        "99\n5\nNoNewPrivs:\t1\n5\n",
        "{}",
        report.stderr()
    );
}

#[test]
fn dropped_capabilities_are_gone_from_every_set() {
    if !is_root() {
        // Nothing to drop; that the request itself is checked is a unit test's business.
        return;
    }
    let agent = Agent::start();
    let mut request = sh("grep -E 'Cap(Inh|Prm|Eff|Bnd)' /proc/self/status");
    request.drop_capabilities = vec![0, 21]; // CHOWN, SYS_ADMIN
    let report = agent.client().run(request);
    let mut lines = 0;
    for line in report.stdout().lines() {
        let set = u64::from_str_radix(line.split_once('\t').unwrap().1, 16).unwrap();
        assert_eq!(set & (1 | 1 << 21), 0, "{line}");
        lines += 1;
    }
    assert_eq!(lines, 4, "{}", report.stderr());
}

#[test]
fn the_default_user_is_root_or_refused() {
    let agent = Agent::start();
    let mut request = exec(&["id", "-u"]);
    request.user = String::new();
    let report = agent.client().run(request);
    if me().starts_with("0:") {
        assert_eq!(report.stdout(), "0\n");
    } else {
        assert_eq!(report.failed.unwrap().stage(), SpawnStage::SpawnCredentials);
    }
}
