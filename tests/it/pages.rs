//! The project's pages: what they link to is there.

use crate::support::root;
use std::fs;
use std::path::{Path, PathBuf};

/// README and its neighbours, and what is in `docs`.
fn pages() -> Vec<PathBuf> {
    ["", "docs"]
        .into_iter()
        .flat_map(|folder| fs::read_dir(root().join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

fn read(page: &Path) -> String {
    fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()))
}

/// A page's text without its blocks of code.
fn prose(page: &Path) -> String {
    read(page).split("```").step_by(2).collect()
}

/// What a link to a heading is called, as GitHub makes it: small letters, digits, and `-` for each
/// space.
fn anchor(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn has_heading(page: &Path, wanted: &str) -> bool {
    prose(page).lines().any(|line| {
        let heading = line.trim_start_matches('#');
        heading != line && anchor(heading.trim()) == wanted
    })
}

#[test]
fn every_link_within_the_project_leads_somewhere() {
    let mut count = 0;
    for page in pages() {
        let text = prose(&page);
        let links = text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            count += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.with_file_name(file),
            };
            let is_there = target.exists() && (heading.is_empty() || has_heading(&target, heading));
            assert!(is_there, "{} links to {link}", page.display());
        }
    }
    assert!(count > 50, "only {count} links were found");
}
