//! `airlock cp`: files and folders in and out of a sandbox that runs.

use airlock_sandbox::client::FileError;
use airlock_sandbox::{Paths, Registry, stop};
use anyhow::bail;

use crate::commands::POST_MORTEM_TIMEOUT;
use crate::copy::{Options, Place, copy};
use crate::lowargs::CpArgs;

pub(crate) async fn cp(args: CpArgs) -> anyhow::Result<u8> {
    let from = Place::parse(args.source).map_err(anyhow::Error::msg)?;
    let to = Place::parse(args.destination).map_err(anyhow::Error::msg)?;
    let name = match (&from, &to) {
        (Place::Guest(_, _), Place::Guest(_, _)) => {
            bail!("both are in a sandbox: copy to here first, or pipe one cp into the other with -")
        }
        (Place::Guest(name, _), _) | (_, Place::Guest(name, _)) => name,
        _ => bail!("neither is in a sandbox: one of them must be NAME:PATH"),
    };
    let dir = Registry::open(&Paths::from_env()?)?.find(name)?;
    let (session, _) = stop::attach(&dir)?;
    let options = Options {
        archive: args.archive,
    };
    let copied = copy(&session.files("/"), &from, &to, options).await;
    if let Err(error) = &copied
        && let Some(FileError::Rpc(_)) = error.downcast_ref()
        && let Some(cause) = stop::end_within(&dir, POST_MORTEM_TIMEOUT).await
    {
        bail!("the VM ended while files were copied: {cause}");
    }
    copied.map(|()| 0)
}
