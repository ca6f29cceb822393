//! `airlock ps` and `airlock images`.

use std::fmt::Write;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use airlock_sandbox::image::{self, Image};
use airlock_sandbox::kernel::{self, Kernel};
use airlock_sandbox::{Paths, Registry, RunDir};
use serde_json::json;

use crate::lowargs::ListArgs;
use crate::output::print;

pub(crate) fn ps(args: &ListArgs) -> anyhow::Result<u8> {
    let sandboxes = Registry::open(&Paths::from_env()?)?.list()?;
    if args.json {
        let list: Vec<_> = sandboxes.iter().map(in_json).collect();
        print(&format!("{:#}\n", json!(list)))?;
        return Ok(0);
    }
    let mut rows = vec![
        [
            "NAME", "STATE", "ENGINE", "IMAGE", "KERNEL", "CPUS", "MEMORY", "AGE",
        ]
        .map(str::to_owned),
    ];
    rows.extend(sandboxes.iter().map(row));
    print(&table(&rows))?;
    Ok(0)
}

fn in_json(dir: &RunDir) -> serde_json::Value {
    // One flat object: what is known of the sandbox, and how it is now.
    let mut value = json!(dir.record());
    if !value.is_object() {
        value = json!({});
    }
    value["name"] = json!(dir.name().as_str());
    value["state"] = json!(dir.state());
    value["dir"] = json!(dir.path());
    value["vm_exit"] = json!(dir.vm_exit());
    value
}

fn row(dir: &RunDir) -> [String; 8] {
    let state = dir.state().as_str().to_owned();
    match dir.record() {
        Some(record) => [
            record.name,
            state,
            record.engine.as_str().to_owned(),
            record.image,
            record.kernel,
            record.cpus.to_string(),
            format!("{}M", record.memory_mib),
            age(record.created_unix_ms),
        ],
        None => [
            dir.name().to_string(),
            state,
            "?".into(),
            "?".into(),
            "?".into(),
            "?".into(),
            "?".into(),
            "?".into(),
        ],
    }
}

pub(crate) fn age(created_unix_ms: u64) -> String {
    let created = UNIX_EPOCH + Duration::from_millis(created_unix_ms);
    let seconds = SystemTime::now()
        .duration_since(created)
        .unwrap_or_default()
        .as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

pub(crate) fn images(args: &ListArgs) -> anyhow::Result<u8> {
    let paths = Paths::from_env()?;
    let images = image::names(&paths);
    let kernels = kernel::names(&paths);
    if args.json {
        print(&format!(
            "{:#}\n",
            json!({"images": images, "kernels": kernels})
        ))?;
        return Ok(0);
    }
    let mut rows = vec![["KIND", "NAME", "SIZE", "FILE"].map(str::to_owned)];
    for name in images {
        let file = Image::find(&paths, &name).map(|image| image.rootfs);
        rows.push(file_row("image", name, file));
    }
    for name in kernels {
        let file = Kernel::find(&paths, Some(&name)).map(|kernel| kernel.image);
        rows.push(file_row("kernel", name, file));
    }
    print(&table(&rows))?;
    Ok(0)
}

fn file_row<E: std::fmt::Display>(
    kind: &str,
    name: String,
    file: Result<std::path::PathBuf, E>,
) -> [String; 4] {
    match file {
        Ok(path) => {
            let mib = fs::metadata(&path).map_or(0, |meta| meta.len().div_ceil(1 << 20));
            [
                kind.to_owned(),
                name,
                format!("{mib}M"),
                path.display().to_string(),
            ]
        }
        Err(error) => [kind.to_owned(), name, "?".to_owned(), error.to_string()],
    }
}

/// Columns as wide as their widest cell, two spaces apart.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            // Writing to a String does not fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_where_their_text_does() {
        let rows = [["NAME", "STATE"], ["a-long-name", "up"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "NAME         STATE\na-long-name  up\n");
    }
}
