//! `airlock stop` and `airlock rm`.

use airlock_sandbox::{Name, Paths, Registry, stop as ending};

use crate::exit::OWN_FAILURE;
use crate::lowargs::{RmArgs, StopArgs};
use crate::output::tell;
use crate::progress;

pub(crate) async fn stop(args: &StopArgs) -> anyhow::Result<u8> {
    let registry = Registry::open(&Paths::from_env()?)?;
    let mut status = 0;
    for name in &args.names {
        let result = async {
            let dir = registry.find(name)?;
            let stopping = ending::stop(&dir, args.timeout);
            progress::shown(&format!("stopping {name}"), stopping)
                .await
                .map_err(anyhow::Error::from)
        };
        status = status.max(said(name, result.await.map(drop)));
    }
    Ok(status)
}

pub(crate) async fn rm(args: &RmArgs) -> anyhow::Result<u8> {
    let registry = Registry::open(&Paths::from_env()?)?;
    let mut status = 0;
    for name in &args.names {
        let result = async {
            let dir = registry.find(name)?;
            ending::remove(&dir, args.force)
                .await
                .map_err(anyhow::Error::from)
        };
        status = status.max(said(name, result.await));
    }
    Ok(status)
}

/// One name's failure does not keep the others from being looked after.
fn said(name: &Name, result: anyhow::Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            let error = crate::chain(&error);
            let whose = if error.contains(name.as_str()) {
                String::new()
            } else {
                format!("{name}: ")
            };
            tell!("airlock: error: {whose}{error}");
            OWN_FAILURE
        }
    }
}
