//! Both images on both kernels, and a real C project that is compiled and tested in one of them.

use std::fs;

use airlock_tests::{Product, cache};

fn os_release(image: &str, kernel: &str) -> String {
    let product = Product::new();
    let run = product
        .airlock([
            "run",
            "--image",
            image,
            "--kernel",
            kernel,
            "--memory",
            "512M",
            "--",
            "sh",
            "-c",
            "uname -r; cat /etc/os-release 2>/dev/null; echo ran",
        ])
        .expect_code(0);
    product.expect_nothing_left();
    assert!(run.out().ends_with("ran\n"), "{}", run.out());
    run.out()
}

#[test]
fn busybox_runs_on_the_projects_kernel() {
    assert!(os_release("busybox", "tuned").contains("-airlock"));
}

#[test]
fn busybox_runs_on_debians_kernel() {
    assert!(os_release("busybox", "debian").contains("deb12"));
}

#[test]
fn debian_runs_on_the_projects_kernel() {
    let text = os_release("debian", "tuned");
    assert!(
        text.contains("-airlock") && text.contains("bookworm"),
        "{text}"
    );
}

#[test]
fn debian_runs_on_debians_kernel() {
    let text = os_release("debian", "debian");
    assert!(
        text.contains("deb12") && text.contains("bookworm"),
        "{text}"
    );
}

#[test]
fn the_debian_image_has_python_git_and_a_compiler() {
    let run = Product::new()
        .airlock(["run", "--image", "debian", "--memory", "512M", "--", "sh", "-ec",
            "python3 -c 'print(6*7)'; git --version; cd /tmp; echo 'int main(void){return 42;}' > a.c; gcc a.c -o a; set +e; ./a; echo $?"])
        .expect_code(0);
    let text = run.out();
    assert!(
        text.starts_with("42\ngit version") && text.ends_with("42\n"),
        "{text}"
    );
}

#[test]
fn a_real_c_project_is_compiled_and_passes_its_own_tests() {
    let folder = cache().join("sources/zlib");
    let tarball = fs::read_dir(&folder)
        .unwrap_or_else(|_| panic!("{}: run scripts/fetch-source zlib", folder.display()))
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(".orig.tar."))
        .expect("scripts/fetch-source fetched it");
    let product = Product::new();
    product
        .airlock(["up", "zlib", "--image", "debian", "--memory", "1G"])
        .expect_code(0);
    let input = fs::read(&tarball).expect("the tarball can be read");
    let unpack = format!(
        "mkdir /root/zlib && cd /root/zlib && tar -x{} --strip-components=1",
        if tarball.to_string_lossy().ends_with("bz2") {
            "j"
        } else {
            "z"
        }
    );
    product
        .airlock_with_input(&["exec", "-i", "zlib", "--", "sh", "-c", &unpack], input)
        .expect_code(0);
    let build = product
        .airlock([
            "exec",
            "-w",
            "/root/zlib",
            "zlib",
            "--",
            "sh",
            "-c",
            "CFLAGS=-O1 ./configure --static && make -j2 && make test",
        ])
        .expect_code(0);
    assert!(
        build.out().contains("*** zlib test OK ***"),
        "{}\n{}",
        build.out(),
        build.err()
    );
    // And the truth when its tests fail.
    product
        .airlock(["exec", "-w", "/root/zlib", "zlib", "--", "sh", "-c", "sed -i 's/strcmp/0 \\&\\& strcmp/; s/hello, hello!/bad/' test/example.c; echo 'int main(void){return 1;}' > test/example.c; make test"])
        .expect_code(2);
    product.airlock(["rm", "-f", "zlib"]).expect_code(0);
    product.expect_nothing_left();
}
